"""nf4 weights in the layout of bitsandbytes 0.50: 16 values, and one scale for each 64 neighbouring inputs of a
channel.

    W[n, k] ~ scales[n, k // 64] * LEVELS[codes[n, k]],    scale = max |w|

The levels are quantiles of a normal distribution, scaled to -1 .. 1, with an exact 0.
Stored: codes [out, in / 2] uint8, row-major, the even input k in the HIGH four bits of byte k // 2, and scales
[out, in / 64] float32: 4.5 bits per weight. These are the bytes of bitsandbytes' `quantize_4bit(weight, blocksize=64,
quant_type="nf4")` and of its `absmax`, without its second quantization of the scales. Its blocks continue from row to
row, so they are the same because 64 divides the inputs.

Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

import torch
from torch import Tensor

from ..kernels.linear_nf4 import BLOCK_SIZE, LEVELS, unpacked
from ..kernels.packed_weight import Packed

__all__ = ["BLOCK_SIZE", "LEVELS", "dequantize_nf4", "quantize_nf4"]

_SMALLEST = 1e-38  # bitsandbytes divides smaller blocks by this, so that zeros become the level 0


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] of any floating dtype to the nearest levels.

    Returns codes [out, in / 2] uint8 and scales [out, in / 64] float32. Raises ValueError for inputs that 64 does not
    divide, other dtypes or shapes, and weights that are not finite.
    """
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise ValueError(f"an nf4 weight is made of a floating [out, in], got {weight.dtype} {tuple(weight.shape)}")
    if weight.shape[1] % BLOCK_SIZE:
        raise ValueError(f"{weight.shape[1]} inputs are not divisible by nf4's blocks of {BLOCK_SIZE}")
    if not weight.isfinite().all():
        raise ValueError(f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are not finite")
    blocks = weight.float().unflatten(1, (-1, BLOCK_SIZE))
    scales = blocks.abs().amax(-1)
    shares = (blocks * (1 / scales.clamp(min=_SMALLEST))[..., None]).clamp(-1, 1)
    levels = torch.tensor(LEVELS, device=weight.device)
    codes = torch.bucketize(shares, (levels[:-1] + levels[1:]) / 2).to(torch.uint8).flatten(1)
    return (codes[:, 0::2] << 4) | codes[:, 1::2], scales


def dequantize_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """scales * LEVELS[codes], [out, in] in `dtype`, rounded once."""
    return unpacked(Packed(codes, scales)).to(dtype)
