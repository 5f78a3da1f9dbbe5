"""int4 weights: one scale, and if asked one zero point, for each group of neighbouring inputs of an output channel.

    symmetric     W[n, k] ~ scales[n, g] * (codes[n, k] - 8)               scale = max |w| / 7
    asymmetric    W[n, k] ~ scales[n, g] * (codes[n, k] - zeros[n, g])     scale = (max(w, 0) - min(w, 0)) / 15

with g = k // group_size, groups of 32, 64 or 128 inputs, and codes 0 .. 15.
Stored: packed [out, in / 2] uint8, row-major, the even input k in the low four bits of byte k // 2 and the odd one
above it, so 16 neighbouring bytes are 32 neighbouring inputs of one channel; scales, and for asymmetric weights zeros,
[out, in / group_size] float16, bfloat16 or float32. Symmetric with groups of 128 and 16-bit scales that is 4.125 bits
a weight. zeros made here are whole numbers; those from elsewhere may be fractions. A group of zeros has scale 0.
"""

import torch
from torch import Tensor

from ..kernels.linear_int4 import GROUP_SIZES, SYMMETRIC_ZERO, unpack_int4, unpacked

__all__ = ["dequantize_int4", "pack_int4", "quantize_int4", "unpack_int4"]


def quantize_int4(
    weight: Tensor, group_size: int = 128, symmetric: bool = True, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight [out, in] of any floating dtype to the nearest codes of its groups.

    Returns packed [out, in / 2] uint8, scales [out, in / group_size] in `scale_dtype`, and zeros likewise or None if
    symmetric. Codes are chosen for the scales as rounded to `scale_dtype`.
    Raises ValueError for inputs that the group does not divide, other groups, dtypes or shapes, for weights that are
    not finite, and for scales too large for `scale_dtype`.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"int4 groups have one of {GROUP_SIZES} inputs, not {group_size}")
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise ValueError(f"an int4 weight is made of a floating [out, in], got {weight.dtype} {tuple(weight.shape)}")
    if weight.shape[1] % group_size:
        raise ValueError(f"{weight.shape[1]} inputs are not divisible by the group of {group_size}")
    if not weight.isfinite().all():
        raise ValueError(f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are not finite")
    groups = weight.float().unflatten(1, (-1, group_size))
    if symmetric:
        lowest, steps = torch.zeros_like(groups[..., 0]), 7
        largest = groups.abs().amax(-1)
    else:
        lowest, steps = groups.amin(-1).clamp_max(0), 15
        largest = groups.amax(-1).clamp_min(0)
    # In float64: the width of a group can pass the largest float32.
    scales = ((largest.double() - lowest.double()) / steps).to(scale_dtype)
    if not scales.isfinite().all():
        raise ValueError(f"weights up to {float(weight.abs().max()):.3g} need scales that {scale_dtype} cannot hold")
    divisors = torch.where(scales > 0, scales, 1).float()
    zeros = torch.full_like(divisors, SYMMETRIC_ZERO) if symmetric else torch.round(-lowest / divisors).clamp(0, 15)
    codes = torch.round(groups / divisors[..., None] + zeros[..., None]).clamp(0, 15).to(torch.uint8)
    return pack_int4(codes.flatten(1)), scales, None if symmetric else zeros.to(scale_dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes [out, in] uint8 of 0 .. 15, two a byte: [out, in / 2] uint8. Raises ValueError for an odd in."""
    if codes.shape[-1] % 2:
        raise ValueError(f"two int4 codes make a byte: {codes.shape[-1]} inputs are odd")
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def dequantize_int4(
    packed: Tensor, scales: Tensor, zeros: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """scales * (codes - zeros), [out, in] in `dtype`, rounded once."""
    return unpacked(packed, scales, zeros).to(dtype)
