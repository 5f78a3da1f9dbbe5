"""Shared parts of products with packed weights: tiles, splits and epilogues of their kernels, and their launches.

    y[m, n] = sum_k x[m, k] * weight[n, k] + bias[n] + residual[m, n]

A kernel has the weights as the left operand of the tensor core's product, the tokens as its columns, and writes its
sums [BLOCK_N, BLOCK_M] by `store_product`, or by `store_block` if it has no SwiGLU pairs. Few rows make few blocks, so
the inner dimension is split, too: each split writes float32 partial sums and increments a counter, and the last split
to do so adds all of them in the order of the splits. That moves splits * rows * out * 8 bytes through L2.

A product of a few rows may end with the residual sum and its RMSNorm (`AddNorm`): the last block of the launch to write
its outputs reads all of them from L2 and normalizes them, one row after the other, in place of a launch of its own.

Without a kernel, the weights are dequantized a tile of channels at a time (`linear_by_tiles`). The formats also share
the specification of a SwiGLU pair, the native products (`NativeProduct`) and the checks of weights in groups.

Source: Osama et al. 2023, arXiv:2301.03598 (split-K).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import activation, native
from .arguments import FLOATING, check_tensors
from .configs import Config, Configs, multiprocessors
from .counters import counters_of, is_last
from .native import products
from .norm import normalize_row, row_blocks
from .row_groups import is_row_invariant
from .strides import as_rows
from .triton_language import tl, triton

FEW_ROWS = 64  # up to here reading the weights bounds a product, and the inner dimension may be split
MOST_SPLITS = 32
_LOADED_AT_ONCE = tl.constexpr(128)  # rows of partial sums; more would spill registers of large tiles
BLOCKS_AT_ONCE = 4  # per multiprocessor: enough loads in flight; more splits only add partial sums
NORMED_ROWS = 4  # up to here the last block normalizes the rows, one after the other, sooner than another launch
NORM_WARPS = 4  # of the products of few rows; the norm's kernel must have as many, so that both sum in one order
FEW_CPU_ROWS = 16  # up to here the native products read the weights once; for more rows dequantizing the weights pays
SMALL_MEMORY = ("sm86", "sm89", "sm120", "gfx942")
_TILE_BYTES = 128 << 20  # of weights dequantized at a time

Weight = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]
"""The tensors of one weight, each with a row per output: codes, scales and, in formats that have them, zeros."""
Linear = Callable[..., Tensor]
"""A product of x with one weight: (x, codes, scales[, zeros], bias, residual)."""


@triton.jit
def block_of(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tokens [BLOCK_M] and outputs [BLOCK_N] of this program. Groups of 8 blocks of tokens reuse weights in L2."""
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
def store_block(acc, out, bias, residual, m, n, rows, columns, ROUNDS: tl.constexpr = False):  # type: ignore[no-untyped-def]
    """Write acc [BLOCK_N, BLOCK_M] + bias + residual. ROUNDS: round to the dtype of `out` before adding the residual,
    too."""
    inside = (m[None, :] < rows) & (n[:, None] < columns)
    at = m[None, :].to(tl.int64) * columns + n[:, None]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < columns, other=0).to(tl.float32)[:, None]
    if ROUNDS:
        acc = acc.to(out.dtype.element_ty).to(tl.float32)
    if residual is not None:
        acc += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_product(  # type: ignore[no-untyped-def]
    acc, up, up_acc, out, partials, counters, bias, residual, norm, m, n, rows, columns, ROW: tl.constexpr
):
    """Write the sums of a product or, with a second weight `up`, silu(acc) * up_acc of the SwiGLU pair.

    partials: float32 [splits, rows, columns], for a pair [2, splits, ...], or None if the inner dimension is not split;
    counters: one for all blocks and one per block of outputs, zero before and after; norm: None, or the normed rows,
    the norm's weight and its eps, with ROW = the next power of two of columns.
    """
    if partials is None:
        if up is not None:
            acc = silu(acc) * up_acc
        store_block(acc, out, bias, residual, m, n, rows, columns, norm is not None)
        if norm is not None:
            _normalize_by_last(out, norm, counters, rows, columns, ROW)
    else:
        splits = tl.num_programs(1)
        size = rows.to(tl.int64) * columns
        inside = (m[None, :] < rows) & (n[:, None] < columns)
        sums = partials + m[None, :].to(tl.int64) * columns + n[:, None]
        mine = sums + tl.program_id(1) * size
        tl.store(mine, acc, mask=inside)
        if up is not None:
            tl.store(mine + splits * size, up_acc, mask=inside)
        if is_last(counters + 1 + tl.program_id(0), splits):
            AT_ONCE: tl.constexpr = _LOADED_AT_ONCE // inside.shape[1]
            if up is None:
                total = _added_up(sums, splits, size, inside, AT_ONCE)
            else:
                total = silu(_added_up(sums, splits, size, inside, AT_ONCE // 2))
                total *= _added_up(sums + splits * size, splits, size, inside, AT_ONCE // 2)
            store_block(total, out, bias, residual, m, n, rows, columns, norm is not None)
            if norm is not None:
                _normalize_by_last(out, norm, counters, rows, columns, ROW)


@triton.jit
def _normalize_by_last(out, norm, counter, rows, columns, ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the RMSNorm of `out`, if this block of outputs is the last one to be written, by the arithmetic of
    `norm.py`."""
    normed, weight, eps = norm
    if is_last(counter, tl.num_programs(0)):
        channel = tl.arange(0, ROW)
        inside = channel < columns
        for row in tl.range(0, rows):
            at = row * columns + channel
            values = tl.load(out + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            values = normalize_row(values, inside, columns, eps, False)
            values *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
            tl.store(normed + at, values.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _added_up(sums, splits, size, inside, AT_ONCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The partial sums of a block, which begin at sums [BLOCK_N, BLOCK_M], of all splits in order."""
    total = tl.zeros(inside.shape, tl.float32)
    for split in tl.range(0, splits, loop_unroll_factor=AT_ONCE):
        total += tl.load(sums + split * size, mask=inside, other=0, cache_modifier=".cg")  # past L1: others wrote them
    return total


def tile_config(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    """The launch of a product in tiles of block_n outputs by block_m tokens, block_k inputs at a time."""
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps, num_stages)


def within_group(config: Config, group: int) -> Config:
    """The config with at most one group of inputs per step."""
    block_k = min(group, config.blocks["BLOCK_K"])
    return Config({**config.blocks, "BLOCK_K": block_k}, config.num_warps, config.num_stages)


def config_for(table: Mapping[int, Configs], rows: int, device: torch.device) -> Config:
    """The entry of `table`, keyed by the largest number of rows, for `rows`; inside `row_invariant`, for one row."""
    rows = rows_to_plan_for(rows)
    return table[next((most for most in table if rows <= most), max(table))].on(device)


def rows_to_plan_for(rows: int) -> int:
    """The number of rows for which a launch is configured: `rows`, but 1 inside `row_invariant`."""
    return 1 if is_row_invariant() else rows


def has_few_rows(x: Tensor) -> bool:
    """Whether a product with x [..., in] is launched with the configs for few rows."""
    return rows_to_plan_for(x.shape[:-1].numel()) <= FEW_ROWS


def blocks(config: Config, rows: int, columns: int) -> int:
    """How many blocks of [BLOCK_M, BLOCK_N] cover [rows, columns]."""
    return -(-rows // config.blocks["BLOCK_M"]) * -(-columns // config.blocks["BLOCK_N"])


def split_inner(config: Config, rows: int, columns: int, inner: int, device: torch.device) -> tuple[int, int]:
    """Number of splits of the inner dimension that fill the GPU, and steps per split. One split for many rows."""
    total = -(-inner // config.blocks["BLOCK_K"])
    rows = rows_to_plan_for(rows)
    if rows > FEW_ROWS:
        return 1, total
    wanted = BLOCKS_AT_ONCE * multiprocessors(device) // blocks(config, rows, columns)
    steps = -(-total // max(1, min(wanted, MOST_SPLITS, total // 2)))
    return -(-total // steps), steps


@dataclass(frozen=True)
class AddNorm:
    """What follows a product of a few rows y: the sum h = residual + y, its result, and the RMSNorm of h, written INTO
    `normed`. As in `add_rms_norm`, y and h are rounded to their dtype."""

    residual: Tensor
    weight: Tensor
    eps: float
    normed: Tensor

    @staticmethod
    def covers(x: Tensor, columns: int) -> bool:
        """Whether a product of x that has `columns` outputs may end with this."""
        few = x.shape[:-1].numel() <= NORMED_ROWS and not is_row_invariant()
        return few and row_blocks(columns)["num_warps"] == NORM_WARPS


def launch_product(
    kernel: Any,
    x: Tensor,
    weight: tuple[Tensor | None, ...],
    up: tuple[Tensor | None, ...],
    bias: Tensor | None,
    residual: Tensor | None,
    config: Config,
    *,
    owner: Tensor | None = None,
    norm: AddNorm | None = None,
    **constants: Any,
) -> Tensor:
    """Run a kernel that multiplies x with packed weights.

    weight: the tensors of the weight, codes first; up: those of the second weight of a SwiGLU pair, or as many None;
    owner: the stored codes, if the codes in `weight` are a view made for this call; norm: in place of a residual.
    """
    assert weight[0] is not None
    residual = residual if norm is None else norm.residual
    tokens, residual = as_rows(x), None if residual is None else as_rows(residual)
    (rows, inner), columns = tokens.shape, len(weight[0])
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    splits, steps = split_inner(config, rows, columns, inner, x.device)
    partials = counters = None
    if splits > 1:
        shape = (splits, rows, columns) if up[0] is None else (2, splits, rows, columns)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    if splits > 1 or norm is not None:
        counters = counters_of(weight[0] if owner is None else owner, 1 + blocks(config, rows, columns))
    if norm is not None:
        assert config.num_warps == NORM_WARPS
    kernel[(blocks(config, rows, columns), splits)](
        tokens,
        *weight,
        *up,
        bias,
        residual,
        out,
        partials,
        counters,
        None if norm is None else (norm.normed, norm.weight, norm.eps),
        rows,
        columns,
        inner,
        steps,
        ROW=0 if norm is None else row_blocks(columns)["BLOCK"],
        **constants,
        **config.options(),
    )
    return out


def launch_rounded_product(
    kernel: Any,
    codes: Tensor,
    row_scales: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    config: Config,
    **constants: Any,
) -> Tensor:
    """Run a kernel that multiplies rounded inputs with packed weights: [rows, out] in `dtype`.

    codes: [rows, in], and row_scales: the rounded inputs; weight: the tensors of the weight, codes first.
    """
    (rows, inner), columns = codes.shape, len(weight[0])
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    kernel[(blocks(config, rows, columns),)](
        codes,
        row_scales,
        *weight,
        bias,
        None if residual is None else as_rows(residual),
        out,
        rows,
        columns,
        inner,
        **constants,
        **config.options(),
    )
    return out


def product_by_tiles(rows: Tensor, columns: int, weight: Callable[[slice], Tensor]) -> Tensor:
    """rows [n, in] times the transpose of a weight [columns, in] that is dequantized a tile of channels at a time."""
    height = max(1, _TILE_BYTES // (rows.shape[1] * rows.element_size()))
    out = torch.empty(rows.shape[0], columns, dtype=rows.dtype, device=rows.device)
    for start in range(0, columns, height):
        tile = slice(start, min(start + height, columns))
        torch.mm(rows, weight(tile).T, out=out[:, tile])
    return out


def linear_by_tiles(
    x: Tensor, weight: Weight, dense: Callable[..., Tensor], bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x W^T + bias + residual; `dense` makes a tile of W, in the dtype of x, from that tile of the weight's tensors."""
    columns = len(weight[0])

    def tile_of(tile: slice) -> Tensor:
        return dense(*(None if part is None else part[tile] for part in weight))

    y = product_by_tiles(as_rows(x), columns, tile_of)
    return add_epilogue(y.view(*x.shape[:-1], columns), bias, residual)


def swiglu_of(linear: Linear, x: Tensor, gate: Weight, up: Weight) -> Tensor:
    """silu(x G^T) * (x U^T) by two products."""
    return activation.swiglu(*(linear(x, *weight, None, None) for weight in (gate, up)))


def swiglu_reference_of(linear_reference: Linear, x: Tensor, gate: Weight, up: Weight) -> Tensor:
    """The specification of a pair, in float64: two products, rounded to the dtype of x once."""
    gated, raised = (linear_reference(x.double(), *weight, None, None) for weight in (gate, up))
    return activation.swiglu_reference(gated, raised).to(x.dtype)


@dataclass(frozen=True)
class NativeProduct:
    """The native functions of one weight format.

    product: x W^T + bias + residual, or silu(x W^T) * (x U^T), of (x, weight, up or None, bias, residual), which reads
    the weights once; unpack: dequantizes weights, given their tensors and a dtype; panels: whether `product` also
    serves many rows, at levels that have panels. Other products use the weights from `unpack`.
    """

    product: Callable[..., Tensor]
    unpack: Callable[..., Tensor]
    panels: bool = True

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x W^T + bias + residual, [..., out]."""
        if self._reads_once(x, weight):
            return self._once(x, weight, None, bias, residual)
        return linear_by_tiles(x, weight, lambda *parts: self.unpack(*parts, x.dtype), bias, residual)

    def swiglu(self, x: Tensor, gate: Weight, up: Weight) -> Tensor:
        """silu(x G^T) * (x U^T), [..., out]."""
        if self._reads_once(x, gate):
            return self._once(x, gate, up, None, None)
        return activation.swiglu(*(self.linear(x, weight, None, None) for weight in (gate, up)))

    def _reads_once(self, x: Tensor, weight: Weight) -> bool:
        rows = as_rows(x)
        return len(rows) <= FEW_CPU_ROWS or (self.panels and products.in_panels(rows, len(weight[0])))

    def _once(
        self, x: Tensor, weight: Weight, up: Weight | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        return self.product(as_rows(x), weight, up, bias, residual).view(*x.shape[:-1], len(weight[0]))


def misfit(x: Tensor, *_others: Tensor | None) -> str | None:
    """Why the native products of a format with float32 scales do not support x, or None."""
    return native.misfit(x)


def grouped_misfit(
    x: Tensor, _codes: Tensor, scales: Tensor, zeros: Tensor | None, *_others: Tensor | None
) -> str | None:
    """Why the native products do not support x and a weight in groups, or None."""
    return native.misfit(x) or native.misfit(scales, zeros)


def grouped_pair_misfit(
    x: Tensor,
    _gate: Tensor,
    gate_scales: Tensor,
    _up: Tensor,
    up_scales: Tensor,
    gate_zeros: Tensor | None,
    up_zeros: Tensor | None,
) -> str | None:
    """The same for a pair of weights."""
    return native.misfit(x) or native.misfit(gate_scales, gate_zeros, up_scales, up_zeros)


def add_epilogue(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """y + bias + residual in the dtype of y."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y if residual is None else y + residual.to(y.dtype)


def check_epilogue(x: Tensor, columns: int, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raise ValueError unless bias [columns] and residual [..., columns], in the dtype of x [..., in], fit."""
    if bias is not None and (bias.shape != (columns,) or not bias.is_contiguous()):
        raise ValueError(f"the bias must be contiguous [{columns}], got {tuple(bias.shape)}")
    if residual is not None and (residual.shape != (*x.shape[:-1], columns) or residual.dtype != x.dtype):
        raise ValueError(
            f"the residual must be {x.dtype} {(*x.shape[:-1], columns)}, got {residual.dtype} {tuple(residual.shape)}"
        )
    check_tensors(x, FLOATING, bias=bias, residual=residual)


def check_groups(columns: int, inner: int, scales: Tensor, zeros: Tensor | None, sizes: Sequence[int]) -> None:
    """Raise ValueError unless scales, and zeros if given, fit a weight [columns, inner] in groups.

    sizes: allowed numbers of inputs per group.
    """
    fits = scales.ndim == 2 and len(scales) == columns and inner in [scales.shape[1] * size for size in sizes]
    if not fits or not scales.is_floating_point() or not scales.is_contiguous():
        raise ValueError(
            f"scales must be contiguous floating [{columns}, {inner} / group] with a group of {tuple(sizes)}, got "
            f"{scales.dtype} {tuple(scales.shape)}"
        )
    if zeros is not None and (
        zeros.shape != scales.shape or not zeros.is_floating_point() or not zeros.is_contiguous()
    ):
        raise ValueError(f"zeros must be like scales, {tuple(scales.shape)}, got {zeros.dtype} {tuple(zeros.shape)}")


def check_alike(gate: Weight, up: Weight) -> None:
    """Raise ValueError unless both weights of a pair have one shape and group, and both or neither have zeros."""
    zeros = [part for part in (*gate[2:], *up[2:]) if part is not None]
    if gate[0].shape != up[0].shape or gate[1].shape != up[1].shape or len(zeros) == 1:
        raise ValueError(
            f"gate {tuple(gate[0].shape)} with scales {tuple(gate[1].shape)} and up {tuple(up[0].shape)} with scales "
            f"{tuple(up[1].shape)} must have one shape and group, and both or neither zeros"
        )
