"""Rounding with error feedback: weights that are not yet rounded compensate for the rounding errors of earlier ones.

Minimizes ||(W - Q) X||^2 over the codes of Q, column after column. With the Gram matrix H = sum x x^T of the inputs and
the upper triangular U of H^-1 = U^T U, rounding column i to Q[:, i] changes the columns j > i, not yet rounded, by

    W[:, j] -= (W[:, i] - Q[:, i]) / U[i, i] * U[i, j]

`damping` times the mean diagonal is added to H's diagonal, so that linearly dependent inputs do not make it singular.
Columns are processed in blocks: one by one within a block, and the columns after it by one product at the block's end.
Rows are independent and are processed some thousand at a time.

The codes, scales and zeros are those of `int4`, `int3` and `int8`. Groups are fitted to the updated weights when they
are rounded. With `activation_order` the columns with the largest inputs are rounded first, while all others can still
compensate for their errors; groups remain neighbouring inputs, so they are fitted to the weights before any feedback.
FLOPs: in^3 for U, and out * in^2 for the feedback; memory: four matrices [in, in].

Source: Frantar et al. 2022, arXiv:2210.17323 (GPTQ).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.linear_int4 import SYMMETRIC_ZERO
from .int3 import STEP, fit_steps, pack_int3
from .int4 import fit_int4, pack_int4, quantize_int4
from .int8 import quantize_int8

_BLOCK = 128
_ROWS = 4096  # of a weight at once
# Scales and zero points [rows, columns] of some columns, from their indices and current weights.
_Grid = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def gptq_int4(
    weight: Tensor,
    gram: Tensor,
    group_size: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
    search: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight [out, in] of any floating dtype to int4 codes for inputs with the Gram matrix `gram`: [in, in].

    `gram` may have any positive factor. search: find scales by `fit_int4`, otherwise by `quantize_int4`. Returns
    packed, scales and zeros like these. Computed in float32, or float64 if the weight is. Raises their ValueErrors, and
    ValueError for a Gram matrix that does not fit, is not finite, or is not positive definite with this `damping`.
    """

    def fit(rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        if search:
            return fit_int4(rows, group_size, symmetric, scale_dtype, importance)[1:]
        return quantize_int4(rows, group_size, symmetric, scale_dtype)[1:]

    codes, scales, zeros = _round_groups(weight, gram, group_size, fit, SYMMETRIC_ZERO, damping, activation_order)
    return pack_int4(codes), scales, None if symmetric else zeros


def gptq_int3(
    weight: Tensor,
    gram: Tensor,
    group_size: int,
    scale_dtype: torch.dtype = torch.bfloat16,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
) -> tuple[Tensor, Tensor]:
    """Like `gptq_int4`, with the codes of `int3` and scales by `fit_int3`. Returns packed and scales."""

    def fit(rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        return fit_steps(rows, group_size, scale_dtype, importance)[1], None

    zero = SYMMETRIC_ZERO // STEP
    codes, steps, _ = _round_groups(weight, gram, group_size, fit, zero, damping, activation_order)
    return pack_int3(STEP * codes), steps / STEP


def _round_groups(
    weight: Tensor,
    gram: Tensor,
    group_size: int,
    fit: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    zero: int,
    damping: float,
    activation_order: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in] uint8 of 0 .. 2 * zero - 1, scales and zeros of a weight in groups.

    fit: scales, and zeros or None for `zero`, of whole groups of columns, given the importance of these columns.
    """
    order, factor = _feedback(weight, gram, damping, activation_order)
    # The cost of a column's error after the best compensation by later columns.
    importance = torch.empty_like(factor[0])
    importance[order] = factor.diagonal().pow(-2)

    def rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scales, found = fit(rows, importance)
        zeros = torch.full_like(scales, zero) if found is None else found

        def grid(columns: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
            groups = columns // group_size
            if not activation_order:
                first, group = int(columns[0]), groups[:1]
                scale, shift = fit(current, importance[first : first + current.shape[1]])
                scales[:, group] = scale
                if shift is not None:
                    zeros[:, group] = shift
            return scales[:, groups], zeros[:, groups]

        # A group that is fitted when it is rounded needs all feedback of earlier columns.
        block = _BLOCK if activation_order else group_size
        codes = _round(rows, order, factor, grid, (0, 2 * zero - 1), block)
        return codes.to(torch.uint8), scales, zeros

    codes, scales, zeros = (torch.cat(parts) for parts in zip(*map(rounded, weight.split(_ROWS)), strict=True))
    return codes, scales, zeros


def gptq_int8(
    weight: Tensor, gram: Tensor, *, damping: float = 0.01, activation_order: bool = True
) -> tuple[Tensor, Tensor]:
    """Like `gptq_int4`, with one scale per channel. Returns codes and scales like `quantize_int8`."""
    order, factor = _feedback(weight, gram, damping, activation_order)
    _, scales = quantize_int8(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)

        def grid(columns: Tensor, current: Tensor, steps: Tensor = scales[rows, None]) -> tuple[Tensor, Tensor]:
            return steps.expand(-1, len(columns)), torch.zeros_like(steps).expand(-1, len(columns))

        codes[rows] = _round(weight[rows], order, factor, grid, (-127, 127), _BLOCK).to(torch.int8)
    return codes, scales


def feedback_factor(gram: Tensor, damping: float = 0.01) -> Tensor:
    """The upper triangular U with (H + damping * mean(diag H) * I)^-1 = U^T U, for a Gram matrix H: [in, in].

    Inputs that were always zero are treated as uncorrelated, with mean size. Raises ValueError if there is no U.
    """
    if damping < 0 or not gram.isfinite().all():
        raise ValueError("error feedback needs a finite Gram matrix and a damping of at least 0")
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    damped = gram.clone()
    damped.diagonal().add_(damping * mean)
    damped.diagonal()[diagonal == 0] = mean if mean > 0 else 1.0
    # U^-1 is an upper triangular R with H = R R^T: the Cholesky factor of H with rows and columns reversed.
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise ValueError(f"the Gram matrix is not positive definite with a damping of {damping:g}; give a larger one")
    del damped
    upper = lower.flip(0, 1)
    del lower
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def _feedback(weight: Tensor, gram: Tensor, damping: float, activation_order: bool) -> tuple[Tensor, Tensor]:
    """The order [in] in which columns are rounded, and the factor U [in, in] for columns in that order."""
    inputs = weight.shape[-1]
    if gram.shape != (inputs, inputs):
        raise ValueError(f"{inputs} inputs have a Gram matrix {(inputs, inputs)}, not {tuple(gram.shape)}")
    gram = gram.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    if not activation_order:
        return torch.arange(inputs, device=weight.device), feedback_factor(gram, damping)
    order = gram.diagonal().argsort(descending=True, stable=True)
    return order, feedback_factor(gram[order][:, order], damping)


def _round(weight: Tensor, order: Tensor, factor: Tensor, grid: _Grid, levels: tuple[int, int], block: int) -> Tensor:
    """The codes [rows, in] within `levels`, in the factor's dtype."""
    left = weight.to(factor.dtype)[:, order]
    codes = torch.empty_like(left)
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        part = left[:, start:stop].clone()
        steps, zeros = (values.to(factor.dtype) for values in grid(order[start:stop], part))
        rounded, errors = _round_block(part, factor[start:stop, start:stop], steps, zeros, levels)
        codes[:, order[start:stop]] = rounded
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _round_block(
    part: Tensor, factor: Tensor, steps: Tensor, zeros: Tensor, levels: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Codes of the columns of `part`, and their errors divided by the factor's diagonal."""
    # Transposed, so that columns are contiguous in memory.
    part, steps, zeros = part.T.contiguous(), steps.T.contiguous(), zeros.T.contiguous()
    codes, errors = torch.empty_like(part), torch.empty_like(part)
    divisors = torch.where(steps != 0, steps, 1)
    for i in range(len(part)):
        codes[i] = torch.round(part[i] / divisors[i] + zeros[i]).clamp_(*levels)
        errors[i] = (part[i] - (codes[i] - zeros[i]) * steps[i]) / factor[i, i]
        part[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return codes.T, errors.T
