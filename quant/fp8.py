"""fp8 weights: the 8-bit float e4m3 with one scale for each output channel.

    scales[n] = max_k |weight[n, k]| / 448
    codes[n, k] = weight[n, k] / scales[n], rounded to the nearest e4m3
    W[n, k] ~ scales[n] * codes[n, k]

Stored: codes [out, in] float8_e4m3fn, row-major, and scales [out] float32: out * (in + 4) bytes. The error of a weight
is at most a sixteenth of it, or 2^-10 of its channel's scale if that is more. A channel of zeros has scale 0.

Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

import torch
from torch import Tensor

from ..kernels.linear_int8 import dequantized
from ..kernels.quantize_rows import E4M3
from ..kernels.quantize_rows import reference as quantize_rows


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] of any floating dtype to the nearest codes. Returns codes float8_e4m3fn, scales [out]
    float32.

    Raises ValueError for other shapes, dtypes, or values that are not finite.
    """
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise ValueError(f"an fp8 weight is made of a floating [out, in], got {weight.dtype} {tuple(weight.shape)}")
    codes, scales = quantize_rows(weight, E4M3)
    if not scales.isfinite().all():
        raise ValueError(f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are not finite")
    return codes, scales


def dequantize_fp8(weight: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """scales * codes, [out, in] in `dtype`, rounded once."""
    return dequantized(weight, scales, dtype)
