"""Rows whose results do not depend on the other rows of the batch.

The order of a product's sums may depend on the number of rows, by which implementations pick tiles, splits and kernels.
Inside `with row_invariant():` an `Operation` whose rounding depends on it passes its implementations groups of rows in
which every row is computed alike, bit for bit.
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
    """Compute each row of the operations called inside independently of the other rows."""
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

    most: rows per group, None for any number; padded: the number of rows to which a group is padded with zeros.
    """

    most: int | None
    padded: Callable[[int], int] = _unpadded


def one_row(*_: object) -> Groups:
    """Each row by a separate call, so that shapes do not depend on the number of rows."""
    return Groups(1)


def any_rows(*_: object) -> Groups:
    """All rows at once: the implementation itself computes rows independently inside `row_invariant`."""
    return Groups(None)


def in_groups(function: Callable[..., Tensor], groups: Groups, rows: Sequence[int], arguments: Sequence[Any]) -> Tensor:
    """The result of `function` for all rows, [..., columns], computed by one call per group.

    rows: positions of the arguments [..., channels] that have a row for each row of the result; they may be None.
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
