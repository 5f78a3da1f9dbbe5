"""The groups of rows that the native products compute alike, inside `row_invariant`."""

import torch
from torch import Tensor

from .native import products
from .row_groups import Groups


def to_tiles(rows: int) -> int:
    """`rows` padded to make tiles of four and three only: tiles of one or two rows sum in a different order."""
    return rows + (-rows - 1) % 4 if rows % 4 in (1, 2) else rows


def few_rows(*_: object) -> Groups:
    """The groups of rows that a product of integers, or of weights in groups, computes alike."""
    return Groups(products.most_few_rows())


def few_rows_in_tiles(*_: object) -> Groups:
    """The groups of rows that a product of floats with ungrouped weights computes alike."""
    return few_rows() if products.adds_in_one_order() else Groups(products.most_few_rows(), to_tiles)


def few_int8_rows(x: Tensor, *_: object) -> Groups:
    """The groups of rows that a product of unquantized rows with int8 weights computes alike."""
    in_integers = x.dtype == torch.bfloat16 and products.multiplies_integers()
    return few_rows() if in_integers else few_rows_in_tiles()
