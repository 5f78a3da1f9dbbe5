"""int8 weights: one scale for each output channel, symmetric.

    scales[n] = max_k |weight[n, k]| / 127,    codes[n, k] = round(weight[n, k] / scales[n]),    W ~ scales[n] * codes

Stored: codes [out, in] int8, row-major, and scales [out] float32: out * (in + 4) bytes. The error of a weight is at
most half its channel's scale. A channel of zeros has scale 0.
"""

import torch
from torch import Tensor

from ..kernels.linear_int8 import dequantized
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
