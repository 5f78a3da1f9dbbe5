"""Calls of the native products with packed weights: tensors in, tensors out.

Arguments are those of `packed_product.Product`, already checked, with x as contiguous rows [rows, in]; results are
[rows, out] in the dtype of x. Names are those of `signatures.SIGNATURES`.
"""

import torch
from torch import Tensor

from ..packed_weight import Packed
from . import call, isa
from .recording import widened

_NEON_LEVELS = ("neon", "neondot", "i8mm")
_MOST_FEW_ROWS = {"amx": 4, **dict.fromkeys(("avx512", "avx512vnni", "avxvnni", "avx2", *_NEON_LEVELS), 16)}
"""Up to here a product reads the weights once; more rows go past weights in panels, at the levels that have it."""
_BFLOAT16_LEVELS = ("amx", "avx512", "i8mm")
"""The levels that multiply bfloat16 as it is, which then is the only dtype for panels; at others, all are widened."""

_INTEGER_LEVELS = ("amx", "avx512", "avx512vnni", "avxvnni", *_NEON_LEVELS)
"""The levels that multiply a few rows of bfloat16 with int8 weights as integers."""
_ONE_ORDER_LEVELS = ("avx2", "avxvnni")
"""The levels that add up floats in one order for any number of few rows; `dot` in linear.h."""


def has_panels() -> bool:
    """Whether the level in use has products of many rows."""
    return isa() in _MOST_FEW_ROWS


def multiplies_bfloat16() -> bool:
    """Whether the level in use has instructions that multiply bfloat16. If so, torch's dense products use them, too."""
    return isa() in _BFLOAT16_LEVELS


def in_panels(x: Tensor, columns: int) -> bool:
    """Whether the product of x with a weight or a pair of `columns` columns goes to the kernel for many rows."""
    fits = x.dtype == torch.bfloat16 or not multiplies_bfloat16()
    return fits and has_panels() and x.shape[0] > _MOST_FEW_ROWS[isa()] and columns >= 32


def most_few_rows() -> int:
    """Rows up to which a product reads the weights once: 16 at levels without products of many rows."""
    return _MOST_FEW_ROWS.get(isa(), 16)


def multiplies_integers() -> bool:
    """Whether the level in use multiplies few rows of bfloat16 with int8 weights in integer arithmetic."""
    return isa() in _INTEGER_LEVELS


def adds_in_one_order() -> bool:
    """Whether the level in use adds a row's float products in the same order for any small number of rows."""
    return isa() in _ONE_ORDER_LEVELS


def dense_product(x: Tensor, weight: Tensor, up: Tensor | None, bias: Tensor | None) -> Tensor:
    """x W^T + bias, or silu(x W^T) * (x U^T) with `up`. Reads the weights once for up to 16 rows."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    call("linear", x, weight, up, None if bias is None else widened(bias), out, x.shape[0], *weight.shape, x.dtype)
    return out


def product(
    name: str, x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x W^T + bias + residual, or silu(x W^T) * (x U^T) with `up`, by the native function `name` of a format with
    float32 scales. Reads the weights once for up to 16 rows."""
    out = x.new_empty(x.shape[0], weight.codes.shape[0])
    call(
        name,
        x,
        weight.codes,
        widened(weight.scales).contiguous(),
        up and up.codes,
        up and widened(up.scales).contiguous(),
        *_epilogue(bias, residual),
        out,
        *out.shape,
        x.shape[1],
        x.dtype,
    )
    return out


def grouped_product(
    name: str, x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """As `product`, of a format whose scales have groups and any floating dtype."""
    out = x.new_empty(x.shape[0], weight.codes.shape[0])
    call(
        name,
        x,
        *weight,
        *(up or (None, None, None)),
        *_epilogue(bias, residual),
        out,
        *out.shape,
        x.shape[1],
        x.shape[1] // weight.scales.shape[1],
        weight.scales.dtype,
        x.dtype,
    )
    return out


def unpack(name: str, weight: Packed, inner: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, inner] in `dtype`, rounded once, by the native function `name` of a format with float32
    scales."""
    out = torch.empty(len(weight.codes), inner, dtype=dtype)
    call(name, weight.codes, weight.scales.float().contiguous(), out, *out.shape, dtype)
    return out


def unpack_groups(name: str, weight: Packed, inner: int, dtype: torch.dtype) -> Tensor:
    """As `unpack`, of a format whose scales have groups and any floating dtype."""
    out = torch.empty(len(weight.codes), inner, dtype=dtype)
    call(name, *weight, out, *out.shape, inner // weight.scales.shape[1], weight.scales.dtype, dtype)
    return out


def _epilogue(bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if bias is None else widened(bias), None if residual is None else residual.contiguous()
