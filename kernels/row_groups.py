"""Rows whose results do not depend on the rows beside them.

A product of several rows may sum in another order than that of one row, or of more: the implementation picks tiles,
splits and kernels by their number. Inside `with row_invariant():` an `Operation` whose rounding depends on that gives
its implementations rows in groups of which each row is known to be computed like any other, bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .strides import as_rows

_active: ContextVar[bool] = ContextVar("afnext_row_invariant", default=False)


@contextmanager
def row_invariant() -> Iterator[None]:
    """Compute each row of the operations called inside as if it were alone, whatever rows are beside it."""
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def is_row_invariant() -> bool:
    """Whether operations are called inside `row_invariant`."""
    return _active.get()


def _unpadded(rows: int) -> int:
    return rows


@dataclass(frozen=True)
class Groups:
    """Groups of rows in which an implementation computes every row alike.

    most: rows of a group, None for any number; padded: to how many rows, with zeros, a group of so many is brought.
    """

    most: int | None
    padded: Callable[[int], int] = _unpadded


def one_row(*_: object) -> Groups:
    """Each row by a call of its own: the same shapes, whatever an implementation makes of them."""
    return Groups(1)


def any_rows(*_: object) -> Groups:
    """All rows at once: the implementation itself sees to it that inside `row_invariant` none depends on others."""
    return Groups(None)


def in_groups(function: Callable[..., Tensor], groups: Groups, rows: Sequence[int], arguments: Sequence[Any]) -> Tensor:
    """What `function` returns for all rows, [..., columns], from calls with a group of them each.

    rows: positions of the arguments [..., channels] that have a row for each one of the result; they may be None.
    """
    shape = arguments[rows[0]].shape[:-1]
    count = shape.numel()
    most = groups.most or max(1, count)
    if count <= most and groups.padded(count) == count:
        return function(*arguments)
    flat = {at: as_rows(arguments[at]) for at in rows if arguments[at] is not None}
    results = []
    for start in range(0, count, most):
        size = min(most, count - start)
        group = list(arguments)
        for at, tensor in flat.items():
            # A copy begins at an aligned address, on which a library's order of summation may depend.
            group[at] = F.pad(tensor[start : start + size].clone(), (0, 0, 0, groups.padded(size) - size))
        results.append(function(*group)[:size])
    return torch.cat(results).view(*shape, -1)
