"""Linear layers with int8 weights in groups (W8A16), alone or as a SwiGLU pair.

    y[m, n] = sum_k x[m, k] * scales[n, g] * (codes[n, k] - zeros[n, g]) + bias[n] + residual[m, n],    g = k // group
    SwiGLU: y = silu(gate(x)) * up(x), two such products of one x

x: [rows, in] float16, bfloat16 or float32; codes: [out, in] int8; scales, zeros: [out, in / group]; zeros may be
omitted if all are 0. Groups of 16, 32, 64 or 128 inputs. Sums and epilogues are float32 and are rounded to the dtype of
x once.

The format serves existing weights: those of GGUF files with five, six and eight bits. A scale for each channel
(`linear_int8`) is smaller and faster.

Bound by memory up to about 100 rows: a launch reads out * in * (1 + 4 / group) bytes of codes and float32 scales, twice
the scales with zeros, once for every BLOCK_M rows. 2 * rows * out * in operations. Few rows: the tensor cores multiply
the codes minus their zero, and the scale multiplies a group's sum. Many rows: the scale multiplies the weights before
they are rounded. Inner dimensions are split as in `packed_product`.

Native, on a CPU: for up to 16 rows the weights are read once from memory and converted to float32 in registers. For
more rows, and in torch, weights are made dense a tile of channels at a time.
"""

import torch
from torch import Tensor

from .arguments import FLOATING, check_tensors
from .configs import Config, Configs
from .dispatch import Operation
from .few_rows import few_rows
from .native import products
from .packed_product import (
    AddNorm,
    NativeProduct,
    add_epilogue,
    block_of,
    check_alike,
    check_epilogue,
    check_groups,
    config_for,
    grouped_misfit,
    grouped_pair_misfit,
    launch_product,
    linear_by_tiles,
    store_product,
    swiglu_of,
    swiglu_reference_of,
    tile_config,
    within_group,
)
from .row_groups import any_rows
from .triton_language import tl, triton

GROUP_SIZES = (16, 32, 64, 128)


def unpacked(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The weights [out, in], in float32, or float64 if the scales are."""
    dtype = torch.promote_types(scales.dtype, torch.float32)
    weights = codes.to(dtype).unflatten(1, (scales.shape[1], -1))
    if zeros is not None:
        weights = weights - zeros.to(dtype)[..., None]
    return (weights * scales.to(dtype)[..., None]).flatten(1)


def linear_int8_groups_reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The specification of `linear_int8_groups`, in float64."""
    y = x.double() @ unpacked(codes, scales.double(), zeros).T
    return add_epilogue(y, bias, residual).to(x.dtype)


def linear_int8_groups_swiglu_reference(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    up: Tensor,
    up_scales: Tensor,
    gate_zeros: Tensor | None,
    up_zeros: Tensor | None,
) -> Tensor:
    """The specification of `linear_int8_groups_swiglu`, in float64."""
    weights = (gate, gate_scales, gate_zeros), (up, up_scales, up_zeros)
    return swiglu_reference_of(linear_int8_groups_reference, x, *weights)


@triton.jit
def _add_group(acc, tokens, codes, scales, zeros, at, group, SCALE_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + the product of a tile of weights, whose codes begin at codes + at and lie in one group, with tokens."""
    weights = tl.load(codes + at).to(tl.float32)
    if zeros is not None:
        weights -= tl.load(zeros + group).to(tl.float32)[:, None]
    scale = tl.load(scales + group).to(tl.float32)[:, None]
    if SCALE_WEIGHTS:
        acc = tl.dot((weights * scale).to(DTYPE), tokens, acc, input_precision="ieee")
    else:
        acc += tl.dot(weights.to(DTYPE), tokens, input_precision="ieee") * scale
    return acc


@triton.jit(do_not_specialize=["rows", "steps"])
def _groups_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    zeros,
    up,
    up_scales,
    up_zeros,
    bias,
    residual,
    out,
    partials,
    counters,
    norm,
    rows,
    columns,
    inner,
    steps,
    GROUP: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SCALE_WEIGHTS: tl.constexpr = BLOCK_M > 64
    DTYPE: tl.constexpr = x.dtype.element_ty
    m, n = block_of(rows, columns, BLOCK_M, BLOCK_N)
    channel = tl.minimum(n, columns - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    xs = x + m[None, :].to(tl.int64) * inner + k[:, None]
    at = channel[:, None] * inner + k[None, :]
    groups = channel * (inner // GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = tl.program_id(1) * steps * BLOCK_K
    for first in range(start, tl.minimum(start + steps * BLOCK_K, inner), BLOCK_K):
        tokens = tl.load(xs + first, mask=m[None, :] < rows, other=0)
        here, group = at + first, groups + first // GROUP
        acc = _add_group(acc, tokens, codes, scales, zeros, here, group, SCALE_WEIGHTS, DTYPE)
        if up is not None:
            up_acc = _add_group(up_acc, tokens, up, up_scales, up_zeros, here, group, SCALE_WEIGHTS, DTYPE)
    store_product(acc, up, up_acc, out, partials, counters, bias, residual, norm, m, n, rows, columns, ROW)


# Keys: the most rows that a config is for; the last also serves more. BLOCK_K is cut to the group.
_GROUPS = {
    16: Configs("linear_int8_groups_16", tile_config(16, 64, 64, 4, 4)),
    64: Configs("linear_int8_groups_64", tile_config(64, 64, 64, 8, 3)),
    128: Configs("linear_int8_groups_128", tile_config(128, 64, 64, 8, 3)),
}
# A pair has two sums for each output; with 128 rows they do not fit in registers.
_GROUPS_PAIR = {most: configs for most, configs in _GROUPS.items() if most <= 64}


def _config_of(rows: int, group: int, pair: bool, device: torch.device) -> Config:
    return within_group(config_for(_GROUPS_PAIR if pair else _GROUPS, rows, device), group)


def groups_triton(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    up: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
    residual: Tensor | None,
    norm: AddNorm | None = None,
) -> Tensor:
    """The product on a GPU. weight, up: (codes, scales, zeros); norm: see `linear_norm`."""
    group = x.shape[-1] // weight[1].shape[1]
    config = _config_of(x.shape[:-1].numel(), group, up[0] is not None, x.device)
    return launch_product(_groups_kernel, x, weight, up, bias, residual, config, norm=norm, GROUP=group)


_linear = Operation("linear_int8_groups", linear_int8_groups_reference, rows=(0, 5))
_swiglu = Operation("linear_int8_groups_swiglu", linear_int8_groups_swiglu_reference, rows=(0,))


@_linear.implementation("triton", groups=any_rows)
def _linear_triton(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    return groups_triton(x, (codes, scales, zeros), (None, None, None), bias, residual)


@_swiglu.implementation("triton", groups=any_rows)
def _swiglu_triton(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    up: Tensor,
    up_scales: Tensor,
    gate_zeros: Tensor | None,
    up_zeros: Tensor | None,
) -> Tensor:
    return groups_triton(x, (gate, gate_scales, gate_zeros), (up, up_scales, up_zeros), None, None)


_native = NativeProduct(products.int8_groups_product, products.unpack_int8_groups, panels=False)


@_linear.implementation("native", grouped_misfit, few_rows)
def _linear_native(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    return _native.linear(x, (codes, scales, zeros), bias, residual)


@_swiglu.implementation("native", grouped_pair_misfit, few_rows)
def _swiglu_native(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    up: Tensor,
    up_scales: Tensor,
    gate_zeros: Tensor | None,
    up_zeros: Tensor | None,
) -> Tensor:
    return _native.swiglu(x, (gate, gate_scales, gate_zeros), (up, up_scales, up_zeros))


@_linear.implementation("torch")
def _linear_torch(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    return linear_by_tiles(x, (codes, scales, zeros), lambda *tile: unpacked(*tile).to(x.dtype), bias, residual)


@_swiglu.implementation("torch")
def _swiglu_torch(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    up: Tensor,
    up_scales: Tensor,
    gate_zeros: Tensor | None,
    up_zeros: Tensor | None,
) -> Tensor:
    return swiglu_of(_linear_torch, x, (gate, gate_scales, gate_zeros), (up, up_scales, up_zeros))


def linear_int8_groups(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + residual with int8 weights in groups, W[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]).

    x: [..., in] floating; codes: [out, in] int8; scales and zeros: [out, in / group] floating, of groups of 16, 32, 64
    or 128 inputs; bias: [out]; residual: [..., out] in the dtype of x. Returns [..., out] in the dtype of x.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    check_int8_groups(x, codes, scales, zeros)
    check_epilogue(x, len(codes), bias, residual)
    return _linear.on(x.device)(x, codes, scales, zeros, bias, residual)


def linear_int8_groups_swiglu(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    up: Tensor,
    up_scales: Tensor,
    gate_zeros: Tensor | None = None,
    up_zeros: Tensor | None = None,
) -> Tensor:
    """silu(x G^T) * (x U^T), x read once; gate and up are weights of one shape and group as in `linear_int8_groups`.

    Either both have zeros or neither has. Raises ValueError otherwise.
    """
    check_int8_groups(x, gate, gate_scales, gate_zeros)
    check_int8_groups(x, up, up_scales, up_zeros)
    check_alike((gate, gate_scales, gate_zeros), (up, up_scales, up_zeros))
    return _swiglu.on(x.device)(x, gate, gate_scales, up, up_scales, gate_zeros, up_zeros)


def check_int8_groups(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    """Raise ValueError unless x [..., in] and a weight in groups are valid for `linear_int8_groups`."""
    if codes.dtype != torch.int8 or codes.ndim != 2 or codes.shape[1] == 0 or not codes.is_contiguous():
        raise ValueError(f"codes must be contiguous int8 [out, in], got {codes.dtype} {tuple(codes.shape)}")
    inner = codes.shape[1]
    if not x.is_floating_point() or x.shape[-1:] != (inner,):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; codes {tuple(codes.shape)} take [..., {inner}]")
    if zeros is not None and zeros.dtype != scales.dtype:
        raise ValueError(f"zeros must be like scales, {scales.dtype}, got {zeros.dtype}")
    check_groups(len(codes), inner, scales, zeros, GROUP_SIZES)
    check_tensors(x, (torch.int8,), codes=codes)
    check_tensors(x, FLOATING, x=x, scales=scales, zeros=zeros)
