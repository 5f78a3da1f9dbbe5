"""nvfp4 and mxfp4 weights: the 4-bit float e2m1, with a scale for each 16 or 32 neighbouring inputs of a channel.

    nvfp4    W[n, k] ~ channels[n] * scales[n, k // 16] * e2m1(codes[n, k])    scales in e4m3, channels in float32
    mxfp4    W[n, k] ~ 2^(scales[n, k // 32] - 127) * e2m1(codes[n, k])        scales in e8m0, a byte

A code is a sign, two bits of exponent and one of mantissa: +-0, 0.5, 1, 1.5, 2, 3, 4 or 6.
Stored: codes [out, in / 2] uint8, row-major, the even input k in the low four bits of byte k // 2; scales [out, in /
block], float8_e4m3fn or uint8; and for nvfp4 channels [out] float32. A weight takes 4.5 or 4.25 bits. Files of other
libraries have one float32 scale for the whole tensor: here each channel has its own, so it may differ.

Of a few candidates for a block's scale, the one with the smallest squared error, sum of importance * error^2, is used:
for nvfp4 the block's largest weight divided by 7, 6.5, 6, 4.5 or 4, for mxfp4 the least power of two with which that
weight is at most 6, and half of it. RMS error of normal weights: 8.3 % of the weights' RMS in nvfp4, 9.5 % with the
divisor 6 alone; 11.2 % in mxfp4.

Source: see `kernels/linear_nvfp4.py`; Cook et al. 2025, arXiv:2512.02010 (blocks whose largest weight becomes 4).
"""

import torch
from torch import Tensor

from ..kernels.linear_nvfp4 import E8M0, LEVELS, MXFP4_BLOCK, NVFP4_BLOCK, block_scales, unpacked
from ..kernels.packed_weight import Packed
from ..kernels.quantize_rows import E4M3
from .int4 import pack_int4

_LARGEST_SCALE = 256  # with the divisor 6; with 4 it is 384, which e4m3 has, too
_DIVISORS = (7.0, 6.5, 6.0, 4.5, 4.0)
_LEAST_E8M0, _MOST_E8M0 = 0, 254  # 255 is NaN
_BIAS = 127


def quantize_nvfp4(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight [out, in] of any floating dtype. Returns codes, scales and channels of nvfp4.

    importance: [in], not negative, weights of each input channel's error; equal by default. Raises ValueError for
    inputs that 16 does not divide, other dtypes or shapes, and weights that are not finite.
    """
    blocks, weights = _blocks(weight, NVFP4_BLOCK, importance)
    largest = blocks.abs().amax(-1)
    channels = largest.amax(-1) / (_LARGEST_SCALE * LEVELS[-1])
    unit = torch.where(channels > 0, channels, 1)[:, None]
    shares = blocks / unit[..., None]
    candidates = [(largest / unit / divisor).to(E4M3) for divisor in _DIVISORS]
    codes, scales = _best(shares, weights, candidates)
    return pack_int4(codes.flatten(1)), scales, channels


def quantize_mxfp4(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] of any floating dtype. Returns codes and scales of mxfp4.

    importance, ValueError: as in `quantize_nvfp4`, for inputs that 32 does not divide.
    """
    blocks, weights = _blocks(weight, MXFP4_BLOCK, importance)
    largest = blocks.abs().amax(-1).double()
    exponents = torch.where(largest > 0, (largest / LEVELS[-1]).log2().ceil(), -_BIAS)
    candidates = [(exponents + _BIAS - less).clamp(_LEAST_E8M0, _MOST_E8M0).to(E8M0) for less in (0, 1)]
    codes, scales = _best(blocks, weights, candidates)
    return pack_int4(codes.flatten(1)), scales


def dequantize_nvfp4(
    codes: Tensor, scales: Tensor, channels: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights [out, in] of nvfp4 or, without channels, mxfp4 in `dtype`, rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    return unpacked(Packed(codes, scales, channels), wide).to(dtype)


def _blocks(weight: Tensor, size: int, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weight and the importance in blocks: [out, blocks, size] and [blocks, size] float32."""
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise ValueError(f"a weight in e2m1 is made of a floating [out, in], got {weight.dtype} {tuple(weight.shape)}")
    if weight.shape[1] % size:
        raise ValueError(f"{weight.shape[1]} inputs are not divisible by blocks of {size}")
    if importance is not None and (importance.shape != weight.shape[1:] or not bool((importance >= 0).all())):
        raise ValueError(f"importance must be [{weight.shape[1]}], not negative, got {tuple(importance.shape)}")
    wide = weight.float()
    if not wide.isfinite().all():
        raise ValueError(f"{int((~wide.isfinite()).sum())} of {weight.numel()} weights are not finite")
    return wide.unflatten(1, (-1, size)), None if importance is None else importance.float().view(-1, size)


def _best(blocks: Tensor, importance: Tensor | None, candidates: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Codes [out, blocks, size] uint8 and scales of the candidate with the smallest squared error.

    Errors are relative to the block's largest weight, so that squares neither overflow nor underflow.
    """
    largest = blocks.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1)
    best_codes, best_scales = torch.empty(0), candidates[0]
    least = torch.full_like(largest, torch.inf)
    for scales in candidates:
        factors = block_scales(scales, torch.float32)[..., None]
        codes = _nearest(blocks / torch.where(factors > 0, factors, 1))
        errors = ((blocks - _value(codes) * factors) / unit).square()
        error = (errors if importance is None else errors * importance).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_codes = codes if best_codes.numel() == 0 else torch.where(better, codes, best_codes)
        best_scales = _where(better.squeeze(-1), scales, best_scales)
    return best_codes, best_scales


def _where(condition: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """torch.where, which has no e4m3."""
    return torch.where(condition, first.view(torch.uint8), second.view(torch.uint8)).view(first.dtype)


def _nearest(shares: Tensor) -> Tensor:
    """The codes of the nearest levels, uint8."""
    levels = torch.tensor(LEVELS, device=shares.device)
    magnitudes = torch.bucketize(shares.abs(), (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return magnitudes | ((shares < 0) & (magnitudes > 0)).to(torch.uint8) << 3


def _value(codes: Tensor) -> Tensor:
    levels = torch.tensor((*LEVELS, *(-level for level in LEVELS)), device=codes.device)
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)
