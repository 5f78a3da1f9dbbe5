"""Linear layers with int4 weights in groups and int8 activations in the same groups (W4A8), alone or as a SwiGLU pair.

    q[m, g], s[m, g] = x[m, g] rounded to int8, one scale for each token and group (`quantize_rows`)
    y[m, n] = sum_g s[m, g] * scales[n, g] * sum_{k in g} q[m, k] * (code[n, k] - zeros[n, g])
              + bias[n] + residual[m, n]
    SwiGLU: y = silu(gate(x)) * up(x), two such products of one q

weight: as in `linear_int4`; x: [rows, in] float16, bfloat16 or float32. Products within a group are
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

from torch import Tensor

from .configs import Configs
from .few_rows import few_rows
from .linear_int4 import check_int4, int4_native, int4_torch, linear_int4_reference, w4a16_triton
from .native import products
from .packed_product import (
    FEW_CPU_ROWS,
    PackedProduct,
    add_epilogue,
    block_of,
    grouped_misfit,
    has_few_rows,
    launch_rounded_product,
    store_block,
    tile_config,
    two_products,
    within_group,
)
from .packed_weight import Packed
from .quantize_rows import quantize_rows
from .quantize_rows import reference as quantize_rows_reference
from .row_groups import any_rows
from .strides import as_rows
from .triton_language import tl, triton


def linear_w4a8_reference(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The specification of `linear_w4a8`: groups of x rounded as by `quantize_rows`, the rest in float64."""
    codes, group_scales = quantize_rows_reference(x.unflatten(-1, (weight.scales.shape[1], -1)))
    rounded = (codes.double() * group_scales.double()[..., None]).flatten(-2)
    return add_epilogue(linear_int4_reference(rounded, weight, None, None), bias, residual).to(x.dtype)


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

W4A8 = PackedProduct("linear_w4a8", linear_w4a8_reference, check_int4, w4a16_triton, zeros=True)


@W4A8.implementation("triton", groups=any_rows)
def _triton(x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if has_few_rows(x):
        return w4a16_triton(x, weight, up, bias, residual)
    groups = weight.scales.shape[1]
    rounded, group = _rounded(x, groups), x.shape[-1] // groups
    config = within_group(_CONFIGS.on(x.device), group)

    def linear(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return launch_rounded_product(_w4a8_kernel, x, rounded, weight, bias, residual, config, GROUP=group)

    return two_products(linear)(x, weight, up, bias, residual)


@W4A8.implementation("native", grouped_misfit, few_rows)
def _native(x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    rows = as_rows(x)
    if len(rows) > FEW_CPU_ROWS and not products.has_panels():
        return int4_native(_restored(x, weight), weight, up, bias, residual)
    y = products.grouped_product("linear_w4a8", rows, weight, up, bias, residual)
    return y.view(*x.shape[:-1], len(weight.codes))


@W4A8.implementation("torch")
def _torch(x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return int4_torch(_restored(x, weight), weight, up, bias, residual)


def _rounded(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """x as contiguous int8 codes [rows, in] and scales [rows, groups]."""
    rows = as_rows(x)
    codes, scales = quantize_rows(rows.unflatten(-1, (groups, -1)))
    return codes.view_as(rows), scales


def _restored(x: Tensor, weight: Packed) -> Tensor:
    """x rounded in the groups of the weight and dequantized: a tensor like x."""
    groups = weight.scales.shape[1]
    codes, scales = _rounded(x, groups)
    return (codes.unflatten(-1, (groups, -1)) * scales[..., None]).view(x.shape).to(x.dtype)


def linear_w4a8(x: Tensor, weight: Packed, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Like `linear_int4`, with each group of x rounded to int8 (W4A8): faster for many rows, less exact.

    On GPUs the kernel of `linear_int4` multiplies up to 64 rows, without rounding x.
    """
    return W4A8.linear(x, weight, bias, residual)


def linear_w4a8_swiglu(x: Tensor, gate: Packed, up: Packed) -> Tensor:
    """silu(x G^T) * (x U^T), each group of x rounded to int8 once. gate, up: same layout; all else as in
    `linear_w4a8`."""
    return W4A8.swiglu(x, gate, up)
