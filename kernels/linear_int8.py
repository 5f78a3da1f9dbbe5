"""Linear layers with int8 weights: W8A16, alone or as a SwiGLU pair.

    W8A16    y[m, n] = scales[n] * sum_k x[m, k] * weight[n, k] + bias[n] + residual[m, n]
    SwiGLU   y       = silu(gate(x)) * up(x), two W8A16 products of one x

x: [rows, in] float16, bfloat16 or float32; weight: [out, in] int8; scales: [out]. Sums and epilogues are float32 and
are rounded to the dtype of x once.

W8A16 is bound by memory up to about 100 rows. A launch must read out * in bytes of weights (half of 16 bits) and reads
them once for every BLOCK_M rows, that is once up to 64 rows; x is read from L2 by every block of outputs. The codes
become the dtype of x in registers, where they are exact, and the channel's scale multiplies the finished sum, so no
rounding of weights is added. The weights are the left operand of the tensor core's product (Hopper takes that one
from registers), the tokens its columns. 2 * rows * out * in operations.
Few rows leave few blocks, so the inner dimension is split too: each split writes float32 partial sums, a second kernel
adds them in a fixed order (results do not depend on timing); that moves splits * rows * out * 8 bytes through L2.

Native, on a CPU: up to 16 rows read the weights once from memory. From AVX-VNNI on they multiply integers, with 256
neighbouring activations as integers of 15 bits with one scale; elsewhere codes become float32 in registers. More rows
go past weights made in the first-level cache (`native/panels.h`), in bfloat16 where it is multiplied fast, else in such
integers (from AVX2 on), of a pair 16 outputs of each at a time, whose sums become one output without a way through
memory; without AVX2 they go to torch's products, with weights made dense a tile at a time.

Source: Dettmers et al. 2022, arXiv:2208.07339 (per-channel int8); Osama et al. 2023, arXiv:2301.03598 (split-K).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import activation, native
from .configs import Config, Configs, multiprocessors
from .dispatch import Operation
from .native import products
from .strides import as_rows
from .triton_language import tl, triton

FEW_ROWS = 64  # up to here the inner dimension may be split
MOST_SPLITS = 32
BLOCKS_AT_ONCE = 4  # for each multiprocessor: enough loads in flight; more splits only cost sums


def linear_int8_reference(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The specification of `linear_int8`, in float64."""
    y = x.double() @ (weight.double() * scales.double()[:, None]).T
    return add_epilogue(y, bias, residual).to(x.dtype)


def linear_int8_swiglu_reference(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    """The specification of `linear_int8_swiglu`, in float64."""
    wide = x.double()
    gated = linear_int8_reference(wide, gate, gate_scales, None, None)
    return activation.swiglu_reference(gated, linear_int8_reference(wide, up, up_scales, None, None)).to(x.dtype)


def add_epilogue(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """y + bias + residual in the dtype of y."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y if residual is None else y + residual.to(y.dtype)


@triton.jit
def block_of(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tokens [BLOCK_M] and outputs [BLOCK_N] of this program. 8 blocks of tokens share the weights in L2."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    first = program // (8 * column_blocks) * 8
    height = tl.minimum(row_blocks - first, 8)
    within = program % (8 * column_blocks)
    m = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    return x / (1.0 + tl.exp(-x))


@triton.jit
def store_block(acc, out, bias, residual, m, n, rows, columns, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write acc [BLOCK_N, BLOCK_M]: as the result, or as partial sums [splits, rows, columns] if SPLITS > 1."""
    inside = (m[None, :] < rows) & (n[:, None] < columns)
    at = m[None, :].to(tl.int64) * columns + n[:, None]
    if SPLITS > 1:
        out += tl.program_id(1).to(tl.int64) * rows * columns
    else:
        if bias is not None:
            acc += tl.load(bias + n, mask=n < columns, other=0).to(tl.float32)[:, None]
        if residual is not None:
            acc += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def _w8a16_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    scales,
    up,
    up_scales,
    bias,
    residual,
    out,
    rows,
    columns,
    inner,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    m, n = block_of(rows, columns, BLOCK_M, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    channel = tl.minimum(n, columns - 1).to(tl.int64)
    xs = x + m[None, :].to(tl.int64) * inner + k[:, None]
    codes = channel[:, None] * inner + k[None, :]
    valid = m[None, :] < rows
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = tl.program_id(1) * steps * BLOCK_K
    for first in range(start, tl.minimum(start + steps * BLOCK_K, inner), BLOCK_K):
        if EVEN:
            tokens = tl.load(xs + first, mask=valid, other=0)
            tile = tl.load(weight + codes + first)
        else:
            left = inner - first
            tokens = tl.load(xs + first, mask=valid & (k[:, None] < left), other=0)
            tile = tl.load(weight + codes + first, mask=k[None, :] < left, other=0)
        acc = tl.dot(tile.to(x.dtype.element_ty), tokens, acc, input_precision="ieee")
        if up is not None:
            if EVEN:
                tile = tl.load(up + codes + first)
            else:
                tile = tl.load(up + codes + first, mask=k[None, :] < inner - first, other=0)
            up_acc = tl.dot(tile.to(x.dtype.element_ty), tokens, up_acc, input_precision="ieee")
    acc *= tl.load(scales + channel).to(tl.float32)[:, None]
    if up is not None:
        up_acc *= tl.load(up_scales + channel).to(tl.float32)[:, None]
        if SPLITS > 1:
            store_block(up_acc, out + SPLITS * rows.to(tl.int64) * columns, None, None, m, n, rows, columns, SPLITS)
        else:
            acc = silu(acc) * up_acc
    store_block(acc, out, bias, residual, m, n, rows, columns, SPLITS)


@triton.jit(do_not_specialize=["size", "splits"])
def _sum_partials_kernel(  # type: ignore[no-untyped-def]
    partials,
    bias,
    residual,
    out,
    size,
    columns,
    splits,
    PAIR: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS).to(tl.int64)
    inside = (split[:, None] < splits) & (at[None, :] < size)
    offsets = split[:, None] * size + at[None, :]
    y = tl.sum(tl.load(partials + offsets, mask=inside, other=0), 0)
    if PAIR:
        up = tl.load(partials + splits * size.to(tl.int64) + offsets, mask=inside, other=0)
        y = silu(y) * tl.sum(up, 0)
    if bias is not None:
        y += tl.load(bias + at % columns, mask=at < size, other=0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + at, mask=at < size, other=0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=at < size)


def tile_config(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    """The launch of a product in tiles of block_n outputs by block_m tokens, block_k inputs at a time."""
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps, num_stages)


SMALL_MEMORY = ("sm86", "sm89", "sm120")
# By the most rows that a config is for; the last also serves more.
_W8A16 = {
    16: Configs("linear_int8_16", tile_config(16, 64, 128, 4, 4)),
    32: Configs("linear_int8_32", tile_config(32, 64, 128, 4, 4)),
    64: Configs("linear_int8_64", tile_config(64, 64, 128, 4, 3)),
    128: Configs(
        "linear_int8_128",
        tile_config(128, 128, 64, 8, 4),
        {chip: tile_config(128, 128, 64, 8, 3) for chip in SMALL_MEMORY},
    ),
}
# A pair has two sums for each output, which in registers leaves room for half as many outputs.
_W8A16_PAIR = {
    **_W8A16,
    128: Configs(
        "linear_int8_pair_128",
        tile_config(128, 64, 64, 8, 3),
        dict.fromkeys(("sm90", "sm100"), tile_config(128, 128, 64, 8, 4)),
    ),
}


def config_for(table: Mapping[int, Configs], rows: int, device: torch.device) -> Config:
    """The entry of a table by most rows that fits `rows`."""
    return table[next((most for most in table if rows <= most), max(table))].on(device)


def blocks(config: Config, rows: int, columns: int) -> int:
    """How many blocks of [BLOCK_M, BLOCK_N] cover [rows, columns]."""
    return -(-rows // config.blocks["BLOCK_M"]) * -(-columns // config.blocks["BLOCK_N"])


def split_inner(config: Config, rows: int, columns: int, inner: int, device: torch.device) -> tuple[int, int]:
    """How many splits of the inner dimension occupy the GPU, and the steps of each. One split if rows are not few."""
    total = -(-inner // config.blocks["BLOCK_K"])
    if rows > FEW_ROWS:
        return 1, total
    wanted = BLOCKS_AT_ONCE * multiprocessors(device) // blocks(config, rows, columns)
    steps = -(-total // max(1, min(wanted, MOST_SPLITS, total // 2)))
    return -(-total // steps), steps


def sum_partials(partials: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Write to out the sums of partials, [splits, rows, columns] or, for silu(gate) * up, [2, splits, ...] float32."""
    size, splits = out.numel(), partials.shape[-3]
    _sum_partials_kernel[(triton.cdiv(size, 256),)](
        partials,
        bias,
        residual,
        out,
        size,
        out.shape[-1],
        splits,
        PAIR=partials.ndim == 4,
        SPLITS=triton.next_power_of_2(splits),
        BLOCK=256,
        num_warps=4,
    )


def launch_product(
    kernel: Any,
    x: Tensor,
    weight: tuple[Tensor | None, ...],
    up: tuple[Tensor | None, ...],
    bias: Tensor | None,
    residual: Tensor | None,
    config: Config,
    **constants: Any,
) -> Tensor:
    """Run a kernel that multiplies x with packed weights, and the one that sums its splits if there are several.

    weight, up: the tensors of the weights, codes first, and of the SwiGLU pair's second ones, or as many None.
    """
    assert weight[0] is not None
    tokens, residual = as_rows(x), None if residual is None else as_rows(residual)
    (rows, inner), columns = tokens.shape, len(weight[0])
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    splits, steps = split_inner(config, rows, columns, inner, x.device)
    shape = (splits, rows, columns) if up[0] is None else (2, splits, rows, columns)
    target = out if splits == 1 else torch.empty(shape, dtype=torch.float32, device=x.device)
    kernel[(blocks(config, rows, columns), splits)](
        tokens,
        *weight,
        *up,
        bias,
        residual,
        target,
        rows,
        columns,
        inner,
        steps,
        SPLITS=splits,
        **constants,
        **config.options(),
    )
    if splits > 1:
        sum_partials(target, out, bias, residual)
    return out


def _w8a16_triton(
    x: Tensor,
    weight: tuple[Tensor, Tensor],
    up: tuple[Tensor | None, Tensor | None],
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """weight, up: (codes, scales)."""
    config = config_for(_W8A16 if up[0] is None else _W8A16_PAIR, x.shape[:-1].numel(), x.device)
    even = x.shape[-1] % config.blocks["BLOCK_K"] == 0
    return launch_product(_w8a16_kernel, x, weight, up, bias, residual, config, EVEN=even)


_linear = Operation("linear_int8", linear_int8_reference)
_swiglu = Operation("linear_int8_swiglu", linear_int8_swiglu_reference)


@_linear.implementation("triton")
def _linear_triton(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return _w8a16_triton(x, (weight, scales), (None, None), bias, residual)


@_swiglu.implementation("triton")
def _swiglu_triton(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    return _w8a16_triton(x, (gate, gate_scales), (up, up_scales), None, None)


FEW_CPU_ROWS = 16  # up to here the native products read the weights once; more rows are worth making them dense


def _misfit(x: Tensor, *_others: Tensor | None) -> str | None:
    return native.misfit(x)


@_linear.implementation("native", _misfit)
def _linear_native(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    rows, columns = as_rows(x), len(weight)
    if rows.shape[0] <= FEW_CPU_ROWS or products.in_panels(rows, columns):
        return products.int8_product(rows, (weight, scales), None, bias, residual).view(*x.shape[:-1], columns)
    y = product_by_tiles(rows, columns, lambda tile: products.unpack_int8(weight[tile], scales[tile], x.dtype))
    return add_epilogue(y.view(*x.shape[:-1], columns), bias, residual)


@_swiglu.implementation("native", _misfit)
def _swiglu_native(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    rows = as_rows(x)
    if rows.shape[0] <= FEW_CPU_ROWS or products.in_panels(rows, len(gate)):
        y = products.int8_product(rows, (gate, gate_scales), (up, up_scales), None, None)
        return y.view(*x.shape[:-1], len(gate))
    raised = _linear_native(x, up, up_scales, None, None)
    return activation.swiglu(_linear_native(x, gate, gate_scales, None, None), raised)


# torch on a CPU: up to here its int8 kernel is faster than widening the weights for a dense product
# (docs/quantization.md).
MOST_ROWS_INT8 = 32
_TILE_BYTES = 128 << 20  # of widened weights at once


@_linear.implementation("torch")
def _linear_torch(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    rows, columns = as_rows(x), len(weight)
    if x.dtype == torch.float16:  # it holds no sum of 127 * x
        y = product_by_tiles(rows, columns, lambda tile: dequantized(weight[tile], scales[tile], x.dtype))
    elif x.dtype == torch.bfloat16 and rows.shape[0] <= MOST_ROWS_INT8:
        y = torch._weight_int8pack_mm(rows, weight, torch.ones_like(scales, dtype=x.dtype)).float() * scales.float()
    else:
        y = product_by_tiles(rows, columns, lambda tile: weight[tile].to(x.dtype)).float() * scales.float()
    return add_epilogue(y.view(*x.shape[:-1], columns), bias, residual).to(x.dtype)


def product_by_tiles(rows: Tensor, columns: int, weight: Callable[[slice], Tensor]) -> Tensor:
    """rows [n, in] times the transpose of a weight [columns, in] that is made dense a tile of channels at a time."""
    height = max(1, _TILE_BYTES // (rows.shape[1] * rows.element_size()))
    out = torch.empty(rows.shape[0], columns, dtype=rows.dtype, device=rows.device)
    for start in range(0, columns, height):
        tile = slice(start, min(start + height, columns))
        torch.mm(rows, weight(tile).T, out=out[:, tile])
    return out


@_swiglu.implementation("torch")
def _swiglu_torch(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    return activation.swiglu(
        _linear_torch(x, gate, gate_scales, None, None), _linear_torch(x, up, up_scales, None, None)
    )


def dequantized(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * scales of [out, in] in `dtype`, rounded once."""
    return (weight.float() * scales.float()[:, None]).to(dtype)


def linear_int8(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x W^T + bias + residual with int8 weights, W[n, k] = scales[n] * weight[n, k] (W8A16).

    x: [..., in] floating, in a multiple of 16; weight: [out, in] int8; scales: [out]; bias: [out]; residual: [..., out]
    in the dtype of x. Returns [..., out] in the dtype of x.
    Raises ValueError for shapes or dtypes that do not fit, as all linear operations here do.
    """
    check_int8(x, weight, scales)
    check_epilogue(x, len(weight), bias, residual)
    return _linear.on(x.device)(x, weight, scales, bias, residual)


def linear_int8_swiglu(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    """silu(x G^T) * (x U^T) with int8 weights, x read once. gate, up: one shape; all else as in `linear_int8`."""
    check_pair(x, gate, gate_scales, up, up_scales)
    return _swiglu.on(x.device)(x, gate, gate_scales, up, up_scales)


def check_int8(x: Tensor, weight: Tensor, scales: Tensor) -> None:
    """Raise ValueError unless x [..., in] and a weight with its scales are as `linear_int8` wants them."""
    if weight.dtype != torch.int8 or weight.ndim != 2 or not weight.is_contiguous():
        raise ValueError(f"the weight must be contiguous int8 [out, in], got {weight.dtype} {tuple(weight.shape)}")
    if not x.is_floating_point() or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; a weight {tuple(weight.shape)} takes [..., in] floating")
    if weight.shape[1] % 16 or weight.shape[1] == 0:
        raise ValueError(f"int8 weights need a multiple of 16 inputs, got {weight.shape[1]}")
    if scales.shape != weight.shape[:1] or not scales.is_floating_point() or not scales.is_contiguous():
        raise ValueError(
            f"scales must be contiguous floating [{len(weight)}], got {scales.dtype} {tuple(scales.shape)}"
        )


def check_pair(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> None:
    """Raise ValueError unless x and both weights are as `linear_int8_swiglu` wants them."""
    check_int8(x, gate, gate_scales)
    check_int8(x, up, up_scales)
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")


def check_epilogue(x: Tensor, columns: int, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raise ValueError unless bias [columns] and residual [..., columns], in the dtype of x [..., in], fit."""
    if bias is not None and (bias.shape != (columns,) or not bias.is_contiguous()):
        raise ValueError(f"the bias must be contiguous [{columns}], got {tuple(bias.shape)}")
    if residual is not None and (residual.shape != (*x.shape[:-1], columns) or residual.dtype != x.dtype):
        raise ValueError(
            f"the residual must be {x.dtype} {(*x.shape[:-1], columns)}, got {residual.dtype} {tuple(residual.shape)}"
        )
