"""Linear layers with nf4 weights: 16 levels, one scale for each 64 neighbouring inputs of a channel (W4A16).

    y[m, n] = sum_k x[m, k] * scales[n, k // 64] * LEVELS[code[n, k]] + bias[n] + residual[m, n]

x: [rows, in] float16, bfloat16 or float32; codes: [out, in / 2] uint8, the even input in a byte's HIGH four bits;
scales: [out, in / 64] float32; the layout of bitsandbytes. The format is here for weights that exist in it; int4 in
groups is smaller and as exact.

The native kernels read out * in * (1/2 + 1/16) bytes once for up to 16 rows: levels come from registers, 16 or, as
bfloat16, 32 at a time, and are scaled after they are summed. More rows go past weights unpacked in panels, where the
level has them, and otherwise, as on torch, in tiles of channels made dense, which write and read out * in * 2 bytes
more.

Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

import torch
from torch import Tensor

from . import native
from .dispatch import Operation
from .linear_int8 import FEW_CPU_ROWS, add_epilogue, as_rows, check_epilogue, product_by_tiles
from .native import products

BLOCK_SIZE = 64
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def unpacked(codes: Tensor, scales: Tensor) -> Tensor:
    """The weights [out, in], in float32, or float64 if the scales are."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device).to(scales.dtype)
    # Row b: the two levels of the byte b. One lookup a byte is what makes unpacking bearable without a kernel.
    table = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), -1)
    pairs = table.index_select(0, codes.flatten().int()).view(len(codes), scales.shape[1], BLOCK_SIZE)
    return (pairs * scales[..., None]).flatten(1)


def linear_nf4_reference(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The specification of `linear_nf4`, in float64."""
    y = x.double() @ unpacked(codes, scales.double()).T
    return add_epilogue(y, bias, residual).to(x.dtype)


_linear = Operation("linear_nf4", linear_nf4_reference)


def _misfit(x: Tensor, *_others: Tensor | None) -> str | None:
    return native.misfit(x)


@_linear.implementation("native", _misfit)
def _linear_native(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    rows, columns, scales = as_rows(x), len(codes), scales.contiguous()
    if len(rows) <= FEW_CPU_ROWS or products.in_panels(rows, columns):
        return products.nf4_product(rows, codes, scales, bias, residual).view(*x.shape[:-1], columns)
    y = product_by_tiles(rows, columns, lambda tile: products.unpack_nf4(codes[tile], scales[tile], x.dtype))
    return add_epilogue(y.view(*x.shape[:-1], columns), bias, residual)


@_linear.implementation("torch")
def _linear_torch(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    def weight(tile: slice) -> Tensor:
        return unpacked(codes[tile], scales[tile]).to(x.dtype)

    y = product_by_tiles(as_rows(x), len(codes), weight)
    return add_epilogue(y.view(*x.shape[:-1], len(codes)), bias, residual)


def linear_nf4(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x W^T + bias + residual with nf4 weights, W[n, k] = scales[n, k // 64] * LEVELS[code[n, k]].

    x: [..., in] floating, in a multiple of 64; codes: [out, in / 2] uint8; scales: [out, in / 64] float32; bias: [out];
    residual: [..., out] in the dtype of x. Returns [..., out] like x. Raises ValueError for what does not fit.
    """
    if codes.dtype != torch.uint8 or codes.ndim != 2 or not codes.is_contiguous():
        raise ValueError(f"codes must be contiguous uint8 [out, in / 2], got {codes.dtype} {tuple(codes.shape)}")
    inner = 2 * codes.shape[1]
    if not x.is_floating_point() or x.shape[-1:] != (inner,) or inner % BLOCK_SIZE or inner == 0:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; codes {tuple(codes.shape)} take [..., {inner}], a multiple of 64"
        )
    if scales.shape != (len(codes), inner // BLOCK_SIZE) or not scales.is_floating_point():
        raise ValueError(
            f"scales must be floating {(len(codes), inner // BLOCK_SIZE)}, got {scales.dtype} {tuple(scales.shape)}"
        )
    check_epilogue(x, len(codes), bias, residual)
    return _linear.on(x.device)(x, codes, scales, bias, residual)
