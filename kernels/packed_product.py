"""Shared parts of products with packed weights: tiles, splits and epilogues of their kernels, and their launches.

    y[m, n] = sum_k x[m, k] * weight[n, k] + bias[n] + residual[m, n]

A kernel has the weights as the left operand of the tensor core's product, the tokens as its columns, and writes its
sums [BLOCK_N, BLOCK_M] by `store_product`, or by `store_block` if it has no SwiGLU pairs. Few rows make few blocks, so
the inner dimension is split, too: each split writes float32 partial sums and increments a counter, and the last split
to do so adds all of them in the order of the splits. That moves splits * rows * out * 8 bytes through L2.

A product of a few rows may end with the residual sum and its RMSNorm (`AddNorm`): the last block of the launch to write
its outputs reads all of them from L2 and normalizes them, one row after the other, in place of a launch of its own.

Without a kernel, the weights are dequantized a tile of channels at a time (`by_tiles`). The formats also share their
operations (`PackedProduct`), the native products (`NativeProduct`) and the checks of weights.

Source: Osama et al. 2023, arXiv:2301.03598 (split-K).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import activation, native
from .arguments import FLOATING, check_tensors
from .configs import Config, Configs, multiprocessors
from .counters import counters_of, is_last
from .dispatch import Operation
from .native import products
from .norm import normalize_row, row_blocks
from .packed_weight import Packed
from .row_groups import Groups, is_row_invariant
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

Linear = Callable[[Tensor, Packed, Tensor | None, Tensor | None], Tensor]
"""x W^T + bias + residual of (x, weight, bias, residual)."""
Product = Callable[[Tensor, Packed, Packed | None, Tensor | None, Tensor | None], Tensor]
"""x W^T + bias + residual, or silu(x W^T) * (x U^T) with `up`, of (x, weight, up, bias, residual)."""
P = TypeVar("P", bound=Product)


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
    up: tuple[Tensor | None, ...] | None,
    bias: Tensor | None,
    residual: Tensor | None,
    config: Config,
    *,
    owner: Tensor,
    norm: AddNorm | None = None,
    **constants: Any,
) -> Tensor:
    """Run a kernel that multiplies x with packed weights.

    weight: the tensors of the weight as the kernel takes them, codes first; up: those of the second weight of a SwiGLU
    pair; owner: the stored codes, of which `weight` may have a view made for this call; norm: in place of a residual.
    """
    residual = residual if norm is None else norm.residual
    tokens, residual = as_rows(x), None if residual is None else as_rows(residual)
    (rows, inner), columns = tokens.shape, len(owner)
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    splits, steps = split_inner(config, rows, columns, inner, x.device)
    partials = counters = None
    if splits > 1:
        shape = (splits, rows, columns) if up is None else (2, splits, rows, columns)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    if splits > 1 or norm is not None:
        counters = counters_of(owner, 1 + blocks(config, rows, columns))
    if norm is not None:
        assert config.num_warps == NORM_WARPS
    kernel[(blocks(config, rows, columns), splits)](
        tokens,
        *weight,
        *(up or (None,) * len(weight)),
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
    x: Tensor,
    rounded: tuple[Tensor, Tensor],
    weight: tuple[Tensor | None, ...],
    bias: Tensor | None,
    residual: Tensor | None,
    config: Config,
    **constants: Any,
) -> Tensor:
    """Run a kernel that multiplies rounded inputs with packed weights: [..., out] in the dtype of x.

    rounded: codes of x, [rows, in], and their scales; weight: the tensors of the weight as the kernel takes them, codes
    first.
    """
    assert weight[0] is not None
    columns = len(weight[0])
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows, inner = rounded[0].shape
    kernel[(blocks(config, rows, columns),)](
        *rounded,
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
    x: Tensor, weight: Packed, dense: Callable[[Packed], Tensor], bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x W^T + bias + residual; `dense` dequantizes a tile of W."""
    columns = len(weight.codes)
    y = product_by_tiles(as_rows(x), columns, lambda tile: dense(weight.rows(tile)).to(x.dtype))
    return add_epilogue(y.view(*x.shape[:-1], columns), bias, residual)


def by_tiles(dense: Callable[[Packed], Tensor]) -> Product:
    """The product in torch of weights that `dense` dequantizes a tile at a time."""
    return two_products(lambda x, weight, bias, residual: linear_by_tiles(x, weight, dense, bias, residual))


def two_products(linear: Linear) -> Product:
    """The product that computes a SwiGLU pair by two calls of `linear`."""

    def product(x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if up is None:
            return linear(x, weight, bias, residual)
        return activation.swiglu(linear(x, weight, None, None), linear(x, up, None, None))

    return product


@dataclass(frozen=True)
class NativeProduct:
    """The product by the native functions linear_`format`, which reads the weights once, and unpack_`format`, which
    dequantizes them.

    grouped: whether scales have groups and any floating dtype; panels: whether linear_`format` also serves many rows,
    at levels that have panels.
    """

    format: str
    grouped: bool
    panels: bool = True

    def __call__(
        self, x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """See `Product`."""
        rows, columns = as_rows(x), len(weight.codes)
        if len(rows) <= FEW_CPU_ROWS or (self.panels and products.in_panels(rows, columns)):
            product = products.grouped_product if self.grouped else products.product
            y = product(f"linear_{self.format}", rows, weight, up, bias, residual)
            return y.view(*x.shape[:-1], columns)
        unpack = products.unpack_groups if self.grouped else products.unpack

        def dense(tile: Packed) -> Tensor:
            return unpack(f"unpack_{self.format}", tile, x.shape[-1], x.dtype)

        return by_tiles(dense)(x, weight, up, bias, residual)


class PackedProduct:
    """The operations of one format of weights: `single`, called `name`, and `pair`, the SwiGLU pair `name`_swiglu."""

    def __init__(
        self,
        name: str,
        reference: Linear,
        check: Callable[[Tensor, Packed], None],
        few_rows: Callable[..., Tensor],
        *,
        zeros: bool = False,
    ):
        """reference: the specification of `single`; check: raises ValueError unless x [..., in] and a weight fit;
        few_rows: a `Product` by Triton for few rows, which also takes `norm`, an `AddNorm`; zeros: whether weights may
        have zeros."""

        def swiglu_reference(x: Tensor, gate: Packed, up: Packed) -> Tensor:
            # Two products, rounded to the dtype of x once.
            gated, raised = (reference(x.double(), weight, None, None) for weight in (gate, up))
            return activation.swiglu_reference(gated, raised).to(x.dtype)

        self.single = Operation(name, reference, rows=(0, 3))
        self.pair = Operation(f"{name}_swiglu", swiglu_reference, rows=(0,))
        self.few_rows = few_rows
        self._check = check
        self._zeros = zeros

    def implementation(
        self,
        name: str,
        misfit: Callable[..., str | None] | None = None,
        groups: Callable[..., Groups] | None = None,
    ) -> Callable[[P], P]:
        """Register the decorated `Product` for both operations. See `Operation.implementation`."""

        def register(product: P) -> P:
            def linear(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
                return product(x, weight, None, bias, residual)

            def swiglu(x: Tensor, gate: Packed, up: Packed) -> Tensor:
                return product(x, gate, up, None, None)

            self.single.implementation(name, misfit, groups)(linear)
            self.pair.implementation(name, misfit, groups)(swiglu)
            return product

        return register

    def check(self, x: Tensor, weight: Packed) -> None:
        """Raise ValueError unless x [..., in] and the weight fit."""
        if weight.zeros is not None and not self._zeros:
            raise ValueError(f"{self.single.name} takes weights without zeros")
        self._check(x, weight)

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x W^T + bias + residual, [..., out] in the dtype of x. Raises ValueError if arguments do not fit."""
        self.check(x, weight)
        check_epilogue(x, len(weight.codes), bias, residual)
        return self.single.on(x.device)(x, weight, bias, residual)

    def swiglu(self, x: Tensor, gate: Packed, up: Packed) -> Tensor:
        """silu(x G^T) * (x U^T), [..., out] in the dtype of x. Raises ValueError if arguments do not fit."""
        self.check(x, gate)
        self.check(x, up)
        check_alike(gate, up)
        return self.pair.on(x.device)(x, gate, up)


def misfit(x: Tensor, *_others: object) -> str | None:
    """Why the native products of a format with float32 scales do not support x, or None."""
    return native.misfit(x)


def grouped_misfit(x: Tensor, *others: Packed | Tensor | None) -> str | None:
    """Why the native products do not support x and the weights in groups among the other arguments, or None."""
    weights = [weight for weight in others if isinstance(weight, Packed)]
    return native.misfit(x) or native.misfit(*(part for weight in weights for part in weight[1:]))


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


def check_alike(gate: Packed, up: Packed) -> None:
    """Raise ValueError unless both weights of a pair have one shape and group, and both or neither have zeros."""
    if gate.codes.shape != up.codes.shape:
        raise ValueError(f"gate {tuple(gate.codes.shape)} and up {tuple(up.codes.shape)} must have one shape")
    if gate.scales.shape != up.scales.shape or (gate.zeros is None) != (up.zeros is None):
        raise ValueError(
            f"gate {tuple(gate.codes.shape)} with scales {tuple(gate.scales.shape)} and up {tuple(up.codes.shape)} "
            f"with scales {tuple(up.scales.shape)} must have one shape and group, and both or neither zeros"
        )
