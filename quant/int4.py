"""int4 weights: one scale, and optionally one zero point, for each group of neighbouring inputs of an output channel.

    symmetric     W[n, k] ~ scales[n, g] * (codes[n, k] - 8)               scale = max |w| / 7
    asymmetric    W[n, k] ~ scales[n, g] * (codes[n, k] - zeros[n, g])     scale = (max(w, 0) - min(w, 0)) / 15

with g = k // group_size, groups of 32, 64 or 128 inputs, and codes 0 .. 15.
Stored: packed [out, in / 2] uint8, row-major, the even input k in the low four bits of byte k // 2 and the odd one
above it, so 16 neighbouring bytes are 32 neighbouring inputs of one channel; scales, and for asymmetric weights zeros,
[out, in / group_size] float16, bfloat16 or float32. Symmetric with groups of 128 and 16-bit scales, a weight takes
4.125 bits. zeros computed here are whole numbers; imported ones may be fractions. A group of zeros has scale 0.

`quantize_int4` takes the scales above. `fit_int4` searches for those with the least squared error, sum of importance *
error^2 over a group, among a few that a group's extreme values suggest; a symmetric group's scale is negative if its
largest weight is positive, so that this weight has the code 0 and all 16 codes are used. For given codes the best scale
is sum(h w c) / sum(h c^2), so a candidate only determines the codes. RMS error of normal weights in symmetric groups of
64: 9.0 % of the weights' RMS after 5 candidates, as after 13, and 10.8 % by `quantize_int4`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.linear_int4 import GROUP_SIZES, SYMMETRIC_ZERO, unpack_int4, unpacked
from ..kernels.packed_weight import Packed

__all__ = ["dequantize_int4", "fit_int4", "fit_symmetric", "pack_int4", "quantize_int4", "unpack_int4"]

_DIVISORS = (7.0, 7.5, 8.0, 8.7, 9.5)  # candidates for a symmetric group's scale: its largest weight divided by these
_SHARES = (1.0, 0.93, 0.86, 0.8)  # of an asymmetric group's range
_CHUNK = 1 << 20  # weights fitted at a time, so that intermediate results stay in the cache


def quantize_int4(
    weight: Tensor, group_size: int = 128, symmetric: bool = True, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight [out, in] of any floating dtype to the nearest codes of its groups.

    Returns packed [out, in / 2] uint8, scales [out, in / group_size] in `scale_dtype`, and zeros likewise or None if
    symmetric. Codes are chosen for the scales as rounded to `scale_dtype`.
    Raises ValueError for inputs that the group does not divide, other groups, dtypes or shapes, for weights that are
    not finite, and for scales too large for `scale_dtype`.
    """
    _check(weight, group_size)
    groups = weight.float().unflatten(1, (-1, group_size))
    if symmetric:
        lowest, steps = torch.zeros_like(groups[..., 0]), 7
        largest = groups.abs().amax(-1)
    else:
        lowest, steps = groups.amin(-1).clamp_max(0), 15
        largest = groups.amax(-1).clamp_min(0)
    # In float64: the range of a group can exceed the largest float32.
    scales = ((largest.double() - lowest.double()) / steps).to(scale_dtype)
    _check_scales(scales, weight)
    divisors = torch.where(scales > 0, scales, 1).float()
    zeros = torch.full_like(divisors, SYMMETRIC_ZERO) if symmetric else torch.round(-lowest / divisors).clamp(0, 15)
    codes = torch.round(groups / divisors[..., None] + zeros[..., None]).clamp(0, 15).to(torch.uint8)
    return pack_int4(codes.flatten(1)), scales, None if symmetric else zeros.to(scale_dtype)


def fit_int4(
    weight: Tensor,
    group_size: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Like `quantize_int4`, with the scales (and zeros) of least squared error among a few candidates.

    importance: [in], not negative, weights of each input channel's error, such as its mean square; equal by default.
    Raises the ValueErrors of `quantize_int4`, and ValueError for an importance that does not fit.
    """
    if symmetric:
        codes, scales = fit_symmetric(weight, group_size, SYMMETRIC_ZERO, _DIVISORS, scale_dtype, importance)
        return pack_int4(codes), scales, None
    codes, scales, zeros = _fitted(weight, group_size, _fit_asymmetric, 15, scale_dtype, importance)
    return pack_int4(codes), scales, zeros.to(scale_dtype)


def fit_symmetric(
    weight: Tensor,
    group_size: int,
    zero: int,
    divisors: Sequence[float],
    scale_dtype: torch.dtype,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Codes [out, in] uint8 of 0 .. 2 * zero - 1, which represent scales * (codes - zero), and scales like `fit_int4`.

    divisors: of a group's largest weight, for its candidates. Raises the ValueErrors of `fit_int4`.
    """

    def fit(groups: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        zeros = torch.full_like(largest, zero)
        return _best(groups, weights, [(-largest / divisor, zeros) for divisor in divisors], 2 * zero - 1)

    return _fitted(weight, group_size, fit, 2 * zero - 1, scale_dtype, importance)[:2]


def _fitted(
    weight: Tensor,
    group_size: int,
    fit: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
    top: int,
    scale_dtype: torch.dtype,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes up to `top`, scales, and zeros in float32, from `fit`: scales and zeros of groups and their importance."""
    _check(weight, group_size)
    if importance is not None and (importance.shape != weight.shape[1:] or not bool((importance >= 0).all())):
        raise ValueError(f"importance must be [{weight.shape[1]}], not negative, got {tuple(importance.shape)}")
    parts = []
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        groups = rows.float().unflatten(1, (-1, group_size))
        weights = None if importance is None else importance.to(groups).view(-1, group_size)
        wide, zeros = fit(groups, weights)
        scales = wide.to(scale_dtype)
        _check_scales(scales, rows)
        codes = _codes(groups, scales.float(), zeros, top).to(torch.uint8)
        parts.append((codes.flatten(1), scales, zeros))
    codes, scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return codes, scales, zeros


def _check(weight: Tensor, group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"groups have one of {GROUP_SIZES} inputs, not {group_size}")
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise ValueError(
            f"a weight in groups is made of a floating [out, in], got {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.shape[1] % group_size:
        raise ValueError(f"{weight.shape[1]} inputs are not divisible by the group of {group_size}")
    if not weight.isfinite().all():
        raise ValueError(f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are not finite")


def _check_scales(scales: Tensor, weight: Tensor) -> None:
    if not scales.isfinite().all():
        raise ValueError(f"weights up to {float(weight.abs().max()):.3g} need scales that {scales.dtype} cannot hold")


def _fit_asymmetric(groups: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    lowest, highest = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    # Divided before subtraction: the range of a group can exceed the largest float32.
    full = highest / 15 - lowest / 15
    candidates = []
    for share in _SHARES:
        scales = share * full
        divisors = torch.where(scales > 0, scales, 1)
        candidates.append((scales, torch.round(-share * lowest / divisors).clamp(0, 15)))
    return _best(groups, importance, candidates, 15)


def _best(
    groups: Tensor, importance: Tensor | None, candidates: list[tuple[Tensor, Tensor]], top: int
) -> tuple[Tensor, Tensor]:
    """Scales and zeros [out, groups] of the candidate whose codes, at most `top`, have the least error with their best
    scale.

    The error is sum(h w^2) - sum(h w c)^2 / sum(h c^2), with c = code - zero. Groups are divided by their largest
    weight, so that squares neither overflow nor underflow.
    """
    largest = groups.abs().amax(-1)
    shares = groups / torch.where(largest > 0, largest, 1)[..., None]
    weighted = shares if importance is None else shares * importance
    best_scales, best_zeros = candidates[0]
    best_gain = torch.full_like(largest, -1)
    for scales, zeros in candidates:
        steps = _codes(groups, scales, zeros, top) - zeros[..., None]
        along = (weighted * steps).sum(-1)
        square = (steps.square() if importance is None else steps.square() * importance).sum(-1)
        found = square > 0
        gain = torch.where(found, along.square() / square, 0)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        fitted = torch.where(found, along / square * largest, scales)
        best_scales = torch.where(better, fitted, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    divisors = torch.where(scales != 0, scales, 1)[..., None]
    return torch.round(groups / divisors + zeros[..., None]).clamp_(0, top)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes [out, in] uint8 of 0 .. 15, two per byte: [out, in / 2] uint8. Raises ValueError for an odd in."""
    if codes.shape[-1] % 2:
        raise ValueError(f"two int4 codes make a byte: {codes.shape[-1]} inputs are odd")
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def dequantize_int4(
    packed: Tensor, scales: Tensor, zeros: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """scales * (codes - zeros), [out, in] in `dtype`, rounded once."""
    return unpacked(Packed(packed, scales, zeros)).to(dtype)
