"""Calls of the native products with packed weights: tensors in, tensors out.

Arguments are those of `linear_int8`, `linear_int8_groups`, `linear_int4`, `linear_int3`, `linear_w4a8` and
`linear_nf4`, already checked, with x as contiguous rows [rows, in]; results are [rows, out] in the dtype of x.
"""

import torch
from torch import Tensor

from . import call, isa
from .recording import widened

Int8 = tuple[Tensor, Tensor]
"""codes, scales"""
NF4 = tuple[Tensor, Tensor]
"""codes, scales"""
Int4 = tuple[Tensor, Tensor, Tensor | None]
"""packed, scales, zeros"""
Int3 = tuple[Tensor, Tensor]
"""packed, scales"""
Int8Groups = tuple[Tensor, Tensor, Tensor | None]
"""codes, scales, zeros"""


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


def int8_product(x: Tensor, weight: Int8, up: Int8 | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x W^T + bias + residual, or silu(x W^T) * (x U^T) with `up`. Reads the weights once for up to 16 rows."""
    out = x.new_empty(x.shape[0], weight[0].shape[0])
    call(
        "linear_int8",
        x,
        weight[0],
        widened(weight[1]),
        up and up[0],
        up and widened(up[1]),
        *_epilogue(bias, residual),
        out,
        x.shape[0],
        *weight[0].shape,
        x.dtype,
    )
    return out


def w8a8_product(x: Tensor, weight: Int8, up: Int8 | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """As `int8_product`, with x rounded to int8 first. More than 16 rows need a level with panels."""
    out = x.new_empty(x.shape[0], weight[0].shape[0])
    call(
        "linear_w8a8",
        x,
        weight[0],
        widened(weight[1]),
        up and up[0],
        up and widened(up[1]),
        *_epilogue(bias, residual),
        out,
        x.shape[0],
        *weight[0].shape,
        x.dtype,
    )
    return out


def int4_product(x: Tensor, weight: Int4, up: Int4 | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """As `int8_product`."""
    return _grouped_product("linear_int4", x, weight, up, bias, residual)


def int3_product(x: Tensor, weight: Int3, up: Int3 | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """As `int8_product`."""
    return _grouped_product("linear_int3", x, (*weight, None), up and (*up, None), bias, residual)


def w4a8_product(x: Tensor, weight: Int4, up: Int4 | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """As `int8_product`, with each group of x rounded to int8 first."""
    return _grouped_product("linear_w4a8", x, weight, up, bias, residual)


def int8_groups_product(
    x: Tensor, weight: Int8Groups, up: Int8Groups | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """As `int8_product`, for up to 16 rows."""
    return _grouped_product("linear_int8_groups", x, weight, up, bias, residual)


def nf4_product(x: Tensor, weight: NF4, up: NF4 | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """As `int8_product`."""
    out = x.new_empty(x.shape[0], weight[0].shape[0])
    call(
        "linear_nf4",
        x,
        weight[0],
        widened(weight[1]),
        up and up[0],
        up and widened(up[1]),
        *_epilogue(bias, residual),
        out,
        *out.shape,
        x.shape[1],
        x.dtype,
    )
    return out


def unpack_int8(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """scales * weight, [out, in] in `dtype`, rounded once."""
    out = torch.empty(weight.shape, dtype=dtype)
    call("unpack_int8", weight, scales.float(), out, *weight.shape, dtype)
    return out


def unpack_int4(packed: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scales * (codes - zeros), [out, in] in `dtype`, rounded once."""
    columns, inner = len(packed), 2 * packed.shape[1]
    out = torch.empty(columns, inner, dtype=dtype)
    call("unpack_int4", packed, scales, zeros, out, columns, inner, inner // scales.shape[1], scales.dtype, dtype)
    return out


def unpack_int3(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """scales * (codes - 8), [out, in] in `dtype`, rounded once, for codes 0, 2 .. 14."""
    columns, inner = len(packed), packed.shape[1] // 3 * 8
    out = torch.empty(columns, inner, dtype=dtype)
    call("unpack_int3", packed, scales, None, out, columns, inner, inner // scales.shape[1], scales.dtype, dtype)
    return out


def unpack_int8_groups(codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scales * (codes - zeros), [out, in] in `dtype`, rounded once."""
    columns, inner = codes.shape
    out = torch.empty(columns, inner, dtype=dtype)
    group = inner // scales.shape[1]
    call("unpack_int8_groups", codes, scales, zeros, out, columns, inner, group, scales.dtype, dtype)
    return out


def unpack_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """scales * levels, [out, in] in `dtype`, rounded once."""
    columns, inner = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty(columns, inner, dtype=dtype)
    call("unpack_nf4", codes, scales.float(), out, columns, inner, dtype)
    return out


def _epilogue(bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if bias is None else widened(bias), None if residual is None else residual.contiguous()


def _grouped_product(
    name: str,
    x: Tensor,
    weight: Int4 | Int8Groups,
    up: Int4 | Int8Groups | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    columns, inner, groups = weight[0].shape[0], x.shape[1], weight[1].shape[1]
    out = x.new_empty(x.shape[0], columns)
    call(
        name,
        x,
        *weight,
        *(up or (None, None, None)),
        *_epilogue(bias, residual),
        out,
        x.shape[0],
        columns,
        inner,
        inner // groups,
        weight[1].dtype,
        x.dtype,
    )
    return out
