"""int3 weights: one scale for each group of neighbouring inputs of an output channel, eight values.

    W[n, k] ~ scales[n, g] * (codes[n, k] - 8),    g = k // group_size, codes 0, 2 .. 14

Groups of 32, 64 or 128 inputs; inputs in multiples of 128. Stored: packed [out, 3 * in / 8] uint8, in the layout of
`kernels/linear_int3.py`, and scales [out, in / group_size]: half the step between two values. With groups of 64 and
16-bit scales, a weight takes 3.25 bits.

Scales are searched as those of symmetric int4: the code 0 is for a group's largest weight. RMS error of normal weights
in groups of 64: 17.7 % of the weights' RMS, twice that of int4. Zero points would not pay: at 3.5 bits, groups of 32
have an error of 16.1 %, groups of 64 with zero points 17.6 %.
"""

import torch
from torch import Tensor

from ..kernels.linear_int3 import BLOCK_SIZE, unpack_int3, unpacked
from ..kernels.linear_int4 import SYMMETRIC_ZERO
from ..kernels.packed_weight import Packed
from .int4 import fit_symmetric, pack_int4

__all__ = ["dequantize_int3", "fit_int3", "fit_steps", "pack_int3", "unpack_int3"]

STEP = 2
"""The difference of neighbouring codes."""
_DIVISORS = (3.0, 3.5, 4.0, 4.5, 5.0)  # candidates for a group's step: its largest weight divided by these


def fit_int3(
    weight: Tensor, group_size: int, scale_dtype: torch.dtype = torch.bfloat16, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] of any floating dtype, with the scales of least squared error among a few candidates.

    importance: see `fit_int4`. Returns packed [out, 3 * in / 8] uint8 and scales [out, in / group_size] in
    `scale_dtype`. Raises ValueError as `fit_int4` does, and for inputs that are no multiple of 128.
    """
    codes, steps = fit_steps(weight, group_size, scale_dtype, importance)
    return pack_int3(STEP * codes), steps / STEP


def fit_steps(
    weight: Tensor, group_size: int, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Like `fit_int3`, but returns codes / 2, [out, in] uint8 of 0 .. 7, and scales * 2. Takes any number of groups."""
    return fit_symmetric(weight, group_size, SYMMETRIC_ZERO // STEP, _DIVISORS, scale_dtype, importance)


def pack_int3(codes: Tensor) -> Tensor:
    """Even codes [out, in] uint8 of 0 .. 14, eight in three bytes: [out, 3 * in / 8] uint8.

    Raises ValueError if in is not a multiple of 128.
    """
    if codes.shape[1] % BLOCK_SIZE:
        raise ValueError(f"int3 takes inputs in multiples of {BLOCK_SIZE}, not {codes.shape[1]}")
    quarters = pack_int4(codes).unflatten(1, (-1, 4, 16))
    last = quarters[:, :, 3]
    spare = torch.stack([last >> bit & 0x11 for bit in (1, 2, 3)], 2)
    return (quarters[:, :, :3] | spare).flatten(1)


def dequantize_int3(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """scales * (codes - 8), [out, in] in `dtype`, rounded once."""
    return unpacked(Packed(packed, scales)).to(dtype)
