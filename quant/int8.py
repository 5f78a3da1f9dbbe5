"""int8 weights: one scale for each output channel, or one scale and optionally one zero point for each group of inputs.

    scales[n] = max_k |weight[n, k]| / 127,    codes[n, k] = round(weight[n, k] / scales[n]),    W ~ scales[n] * codes

Stored: codes [out, in] int8, row-major, and scales [out] float32: out * (in + 4) bytes. The error of a weight is at
most half its channel's scale. A channel of zeros has scale 0.

Groups of 16, 32, 64 or 128 neighbouring inputs, g = k // group:

    symmetric     W[n, k] ~ scales[n, g] * codes[n, k]                      scale = max |w| / 127
    asymmetric    W[n, k] ~ scales[n, g] * (codes[n, k] - zeros[n, g])      scale = (max(w, 0) - min(w, 0)) / 255

Stored: the same codes, scales and zeros [out, in / group] float32, float16 or bfloat16. zeros computed here are whole
numbers; imported ones may be fractions. A group of zeros has scale 0.
"""

import torch
from torch import Tensor

from ..kernels.linear_int8 import dequantized
from ..kernels.linear_int8_groups import unpacked
from ..kernels.packed_weight import Packed
from ..kernels.quantize_rows import reference as quantize_rows


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] of any floating dtype to the nearest codes. Returns codes int8, scales [out] float32.

    Raises ValueError for other shapes, dtypes, or values that are not finite.
    """
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise ValueError(f"an int8 weight is made of a floating [out, in], got {weight.dtype} {tuple(weight.shape)}")
    codes, scales = quantize_rows(weight)
    if not scales.isfinite().all():
        raise ValueError(f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are not finite")
    return codes, scales


def dequantize_int8(weight: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """scales * codes, [out, in] in `dtype`, rounded once."""
    return dequantized(weight, scales, dtype)


def quantize_int8_groups(
    weight: Tensor, group_size: int, symmetric: bool, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight [out, in] of any floating dtype, in a multiple of the group, to the nearest codes of its groups.

    Returns codes int8, scales [out, in / group_size] in `scale_dtype`, and zeros likewise or None if symmetric. Codes
    are chosen for the scales as rounded. Raises ValueError for weights that are not finite or too large for the scales.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    lowest, highest = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    # Divided before subtraction: the range of a group can exceed the largest float32.
    wide = torch.maximum(-lowest, highest) / 127 if symmetric else highest / 255 - lowest / 255
    scales = wide.to(scale_dtype)
    if not scales.isfinite().all():
        raise ValueError(f"the weights are not finite, or need scales that {scale_dtype} cannot hold")
    divisors = torch.where(scales > 0, scales, 1).float()
    zeros = torch.zeros_like(wide) if symmetric else torch.round(-128 - lowest / divisors).clamp(-128, 127)
    codes = torch.round(groups / divisors[..., None] + zeros[..., None]).clamp(-128, 127).to(torch.int8)
    return codes.flatten(1), scales, None if symmetric else zeros.to(scale_dtype)


def dequantize_int8_groups(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """scales * (codes - zeros), [out, in] in `dtype`, rounded once."""
    return unpacked(Packed(codes, scales, zeros)).to(dtype)
