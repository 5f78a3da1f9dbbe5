"""Linear layers with int4 weights in groups and int8 activations in the same groups (W4A8), alone or as a SwiGLU pair.

    q[m, g], s[m, g] = x[m, g] rounded to int8, one scale for each token and group (`quantize_rows`)
    y[m, n] = sum_g s[m, g] * scales[n, g] * sum_{k in g} q[m, k] * (code[n, k] - zeros[n, g])
              + bias[n] + residual[m, n]
    SwiGLU: y = silu(gate(x)) * up(x), two such products of one q

packed, scales, zeros: as in `linear_int4`; x: [rows, in] float16, bfloat16 or float32. Products within a group are
exact in int32, all else is float32 and is rounded to the dtype of x once. Rounding x adds a relative error of 0.6 % if
the activations of a group are normally distributed, and more if a group has outliers;
llama.cpp's Q4_0 does the same in groups of 32.

Many rows are bound by arithmetic: 2 * rows * out * in int8 operations, at twice the 16-bit rate, and three float32
operations for each token, output and group. Few rows are bound by memory: out * in * (1/2 + 2 / group) bytes as in
`linear_int4`, and on a CPU half the multiplications of the 15-bit activations there.

Native: for up to 16 rows the weights are read once; for more, they are unpacked in panels (`group_panels.h`). Without
AVX2, and in torch, `linear_int4` multiplies the dequantized activations. Triton: a block takes one group per step,
because two groups cannot share an accumulator. Up to 64 rows use the W4A16 kernel of `linear_int4`, which has small
tiles and splits the inner dimension and does not round x.

Source: Lin et al. 2024, arXiv:2405.04532 (W4A8).
"""

import torch
from torch import Tensor

from . import activation
from .configs import Configs
from .dispatch import Operation
from .few_rows import few_rows
from .linear_int4 import (
    check_int4,
    check_int4_pair,
    linear_int4_native,
    linear_int4_reference,
    linear_int4_torch,
    w4a16_triton,
)
from .native import products
from .packed_product import (
    FEW_CPU_ROWS,
    add_epilogue,
    block_of,
    check_epilogue,
    grouped_misfit,
    grouped_pair_misfit,
    has_few_rows,
    launch_rounded_product,
    store_block,
    swiglu_of,
    swiglu_reference_of,
    tile_config,
    within_group,
)
from .quantize_rows import quantize_rows
from .quantize_rows import reference as quantize_rows_reference
from .row_groups import any_rows
from .strides import as_rows
from .triton_language import tl, triton


def linear_w4a8_reference(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The specification of `linear_w4a8`: groups of x rounded as by `quantize_rows`, the rest in float64."""
    codes, group_scales = quantize_rows_reference(x.unflatten(-1, (scales.shape[1], -1)))
    rounded = (codes.double() * group_scales.double()[..., None]).flatten(-2)
    y = linear_int4_reference(rounded, packed, scales, zeros, None, None)
    return add_epilogue(y, bias, residual).to(x.dtype)


def linear_w4a8_swiglu_reference(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    up: Tensor,
    up_scales: Tensor,
    gate_zeros: Tensor | None,
    up_zeros: Tensor | None,
) -> Tensor:
    """The specification of `linear_w4a8_swiglu`: two products of `linear_w4a8`, rounded to the dtype of x once."""
    weights = (gate, gate_scales, gate_zeros), (up, up_scales, up_zeros)
    return swiglu_reference_of(linear_w4a8_reference, x, *weights)


@triton.jit(do_not_specialize=["rows"])
def _w4a8_kernel(  # type: ignore[no-untyped-def]
    x,
    x_scales,
    codes,
    scales,
    zeros,
    bias,
    residual,
    out,
    rows,
    columns,
    inner,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m, n = block_of(rows, columns, BLOCK_M, BLOCK_N)
    row = tl.minimum(m, rows - 1).to(tl.int64)
    channel = tl.minimum(n, columns - 1).to(tl.int64)
    groups = inner // GROUP
    tokens_at = x + row[None, :] * inner + tl.arange(0, BLOCK_K)[:, None]
    codes_at = codes + channel[:, None] * (inner // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, inner, BLOCK_K):
        packed = tl.load(codes_at + k // 2)
        weights = tl.interleave((packed & 0x0F).to(tl.int8), (packed >> 4).to(tl.int8))
        tokens = tl.load(tokens_at + k)
        group = k // GROUP
        scale = tl.load(scales + channel * groups + group).to(tl.float32)
        by = tl.load(x_scales + row * groups + group)
        if zeros is None:
            dot = tl.dot(weights - 8, tokens, out_dtype=tl.int32).to(tl.float32)
        else:
            zero = tl.load(zeros + channel * groups + group).to(tl.float32)
            total = tl.sum(tokens.to(tl.int32), 0).to(tl.float32)
            dot = tl.dot(weights, tokens, out_dtype=tl.int32).to(tl.float32) - zero[:, None] * total[None, :]
        acc += dot * (scale[:, None] * by[None, :])
    store_block(acc, out, bias, residual, m, n, rows, columns)


_CONFIGS = Configs("linear_w4a8", tile_config(64, 128, 128, 8, 3))  # BLOCK_K is cut to the group

_linear = Operation("linear_w4a8", linear_w4a8_reference, rows=(0, 5))
_swiglu = Operation("linear_w4a8_swiglu", linear_w4a8_swiglu_reference, rows=(0,))


@_linear.implementation("triton", groups=any_rows)
def _linear_triton(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    if has_few_rows(x):
        return w4a16_triton(x, (packed, scales, zeros), (None, None, None), bias, residual)
    y = _product_triton(*_rounded(x, scales.shape[1]), packed, scales, zeros, bias, residual, x.dtype)
    return y.view(*x.shape[:-1], packed.shape[0])


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
    if has_few_rows(x):
        return w4a16_triton(x, (gate, gate_scales, gate_zeros), (up, up_scales, up_zeros), None, None)
    rounded = _rounded(x, gate_scales.shape[1])
    gated = _product_triton(*rounded, gate, gate_scales, gate_zeros, None, None, x.dtype)
    raised = _product_triton(*rounded, up, up_scales, up_zeros, None, None, x.dtype)
    return activation.swiglu(gated, raised).view(*x.shape[:-1], len(gate))


def _product_triton(
    codes: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    group = codes.shape[1] // scales.shape[1]
    config = within_group(_CONFIGS.on(codes.device), group)
    weights = packed, scales, zeros
    return launch_rounded_product(_w4a8_kernel, codes, x_scales, weights, bias, residual, dtype, config, GROUP=group)


@_linear.implementation("native", grouped_misfit, few_rows)
def _linear_native(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    rows = as_rows(x)
    if len(rows) <= FEW_CPU_ROWS or products.has_panels():
        y = products.w4a8_product(rows, (packed, scales, zeros), None, bias, residual)
        return y.view(*x.shape[:-1], packed.shape[0])
    return linear_int4_native(_restored(x, scales.shape[1]), packed, scales, zeros, bias, residual)


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
    rows, weights = as_rows(x), ((gate, gate_scales, gate_zeros), (up, up_scales, up_zeros))
    if len(rows) <= FEW_CPU_ROWS or products.has_panels():
        return products.w4a8_product(rows, *weights, None, None).view(*x.shape[:-1], len(gate))
    restored = _restored(x, gate_scales.shape[1])
    return swiglu_of(linear_int4_native, restored, *weights)


@_linear.implementation("torch")
def _linear_torch(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    rounded = _restored(x, scales.shape[1])
    return linear_int4_torch(rounded, packed, scales, zeros, bias, residual)


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
    rounded = _restored(x, gate_scales.shape[1])
    weights = (gate, gate_scales, gate_zeros), (up, up_scales, up_zeros)
    return swiglu_of(linear_int4_torch, rounded, *weights)


def _rounded(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """x as contiguous int8 codes [rows, in] and scales [rows, groups]."""
    rows = as_rows(x)
    codes, scales = quantize_rows(rows.unflatten(-1, (groups, -1)))
    return codes.view_as(rows), scales


def _restored(x: Tensor, groups: int) -> Tensor:
    """x rounded in groups and dequantized: a tensor like x."""
    codes, scales = _rounded(x, groups)
    return (codes.unflatten(-1, (groups, -1)) * scales[..., None]).view(x.shape).to(x.dtype)


def linear_w4a8(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Like `linear_int4`, with each group of x rounded to int8 (W4A8): faster for many rows, less exact.

    On GPUs the kernel of `linear_int4` multiplies up to 64 rows, without rounding x.
    """
    check_int4(x, packed, scales, zeros)
    check_epilogue(x, packed.shape[0], bias, residual)
    return _linear.on(x.device)(x, packed, scales, zeros, bias, residual)


def linear_w4a8_swiglu(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    up: Tensor,
    up_scales: Tensor,
    gate_zeros: Tensor | None = None,
    up_zeros: Tensor | None = None,
) -> Tensor:
    """silu(x G^T) * (x U^T), each group of x rounded to int8 once. gate, up: same layout; all else as in
    `linear_w4a8`."""
    check_int4_pair(x, (gate, gate_scales, gate_zeros), (up, up_scales, up_zeros))
    return _swiglu.on(x.device)(x, gate, gate_scales, up, up_scales, gate_zeros, up_zeros)
