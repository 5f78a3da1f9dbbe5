"""Rounding with error feedback: the inputs still to come make up for what rounding the weights of one has changed.

Minimizes ||(W - Q) X||^2 over the codes of Q, column after column. With the Gram matrix H = sum x x^T of the inputs and
the upper triangular U of H^-1 = U^T U, rounding column i to Q[:, i] changes the columns j > i, not yet rounded, by

    W[:, j] -= (W[:, i] - Q[:, i]) / U[i, i] * U[i, j]

H gets `damping` times its mean diagonal added to its diagonal, so that inputs that always move together do not make it
singular. Columns are handled in blocks: within a block one by one, the columns behind it at the block's end by one
product. Rows do not depend on each other, so a weight may be given in parts.

The codes, scales and zeros are those of `int4` and `int8`. Groups of int4 are fitted to the weights as they are when
their turn comes. With `activation_order` the columns with the largest inputs are rounded first, while all others can
still make up for them; groups remain neighbouring inputs, so they are fitted to the weights before any feedback.
Operations: in^3 for U, and out * in^2 for the feedback; memory: three matrices [in, in], and two [out, in].

Source: Frantar et al. 2022, arXiv:2210.17323 (GPTQ).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.linear_int4 import SYMMETRIC_ZERO
from .int4 import pack_int4, quantize_int4
from .int8 import quantize_int8

_BLOCK = 128
# Scales and zero points [out, columns] of some columns, from their numbers and their present weights.
_Grid = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def gptq_int4(
    weight: Tensor,
    gram: Tensor,
    group_size: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight [out, in] of any floating dtype to int4 codes for inputs with the Gram matrix `gram`: [in, in].

    `gram` may have any positive factor. Returns packed, scales and zeros as `quantize_int4` does. Computed in float32,
    or float64 if the weight is.
    Raises ValueError for what `quantize_int4` refuses, and for a Gram matrix that does not fit, is not finite, or is
    not positive definite with this `damping`.
    """
    _, scales, zeros = quantize_int4(weight, group_size, symmetric, scale_dtype)

    def grid(columns: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        groups = columns // group_size
        if not activation_order:
            group = int(groups[0])
            _, fitted, zero = quantize_int4(current, group_size, symmetric, scale_dtype)
            scales[:, group] = fitted[:, 0]
            if zeros is not None and zero is not None:
                zeros[:, group] = zero[:, 0]
        steps = scales[:, groups]
        return steps, torch.full_like(steps, SYMMETRIC_ZERO) if zeros is None else zeros[:, groups]

    # A group that is fitted when its turn comes needs all feedback of the columns before it.
    block = _BLOCK if activation_order else group_size
    codes = _round(weight, gram, grid, (0, 15), block=block, damping=damping, activation_order=activation_order)
    return pack_int4(codes.to(torch.uint8)), scales, zeros


def gptq_int8(
    weight: Tensor, gram: Tensor, *, damping: float = 0.01, activation_order: bool = False
) -> tuple[Tensor, Tensor]:
    """Like `gptq_int4`, with one scale a channel. Returns codes and scales as `quantize_int8` does."""
    _, scales = quantize_int8(weight)

    def grid(columns: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        steps = scales[:, None].expand(-1, len(columns))
        return steps, torch.zeros_like(steps)

    codes = _round(weight, gram, grid, (-127, 127), block=_BLOCK, damping=damping, activation_order=activation_order)
    return codes.to(torch.int8), scales


def feedback_factor(gram: Tensor, damping: float = 0.01) -> Tensor:
    """The upper triangular U with (H + damping * mean(diag H) * I)^-1 = U^T U, for a Gram matrix H: [in, in].

    Inputs that were always zero count as if they were alone and of mean size. Raises ValueError if there is no U.
    """
    if damping < 0 or not gram.isfinite().all():
        raise ValueError("error feedback needs a finite Gram matrix and a damping of at least 0")
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    damped = gram.clone()
    damped.diagonal().add_(damping * mean)
    damped.diagonal()[diagonal == 0] = mean if mean > 0 else 1.0
    # U^-1 is an upper triangular R with H = R R^T: the usual factor of H with rows and columns in reverse.
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise ValueError(f"the Gram matrix is not positive definite with a damping of {damping:g}; give a larger one")
    del damped
    upper = lower.flip(0, 1)
    del lower
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def _round(
    weight: Tensor,
    gram: Tensor,
    grid: _Grid,
    levels: tuple[int, int],
    *,
    block: int,
    damping: float,
    activation_order: bool,
) -> Tensor:
    """The codes [out, in] between the two `levels`, as numbers of the dtype that was computed in."""
    inputs = weight.shape[1]
    if gram.shape != (inputs, inputs):
        raise ValueError(f"{inputs} inputs have a Gram matrix {(inputs, inputs)}, not {tuple(gram.shape)}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    gram = gram.to(dtype)
    order = torch.arange(inputs, device=weight.device)
    if activation_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
        gram = gram[order][:, order]
    factor = feedback_factor(gram, damping)
    del gram
    left = weight.to(dtype)[:, order]
    codes = torch.empty_like(left)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        part = left[:, start:stop].clone()
        steps, zeros = (values.to(dtype) for values in grid(order[start:stop], part))
        rounded, errors = _round_block(part, factor[start:stop, start:stop], steps, zeros, levels)
        codes[:, order[start:stop]] = rounded
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _round_block(
    part: Tensor, factor: Tensor, steps: Tensor, zeros: Tensor, levels: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Codes of the columns of `part`, and their errors divided by the factor's diagonal."""
    # Columns become rows, which lie together in memory.
    part, steps, zeros = part.T.contiguous(), steps.T.contiguous(), zeros.T.contiguous()
    codes, errors = torch.empty_like(part), torch.empty_like(part)
    divisors = torch.where(steps != 0, steps, 1)
    for i in range(len(part)):
        codes[i] = torch.round(part[i] / divisors[i] + zeros[i]).clamp_(*levels)
        errors[i] = (part[i] - (codes[i] - zeros[i]) * steps[i]) / factor[i, i]
        part[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return codes.T, errors.T
