"""Linear layers with int8 weights and int8 activations (W8A8), alone or as a SwiGLU pair.

    q[m], s[m] = x[m] rounded to int8 with one scale per token (`quantize_rows`)
    y[m, n] = scales[n] * s[m] * sum_k q[m, k] * codes[n, k] + bias[n] + residual[m, n]    the sum exact, in int32
    SwiGLU    y = silu(gate(x)) * up(x), two such products of one q

weight: as in `linear_int8`; x: [rows, in] float16, bfloat16 or float32. The epilogue is float32 and is rounded
to the dtype of x once. For a pair, gate and up are rounded, too, where no kernel computes both at once.

2 * rows * out * in int8 operations, at twice the 16-bit rate. Bytes: out * in of the weight, rows * in of the codes.
On GPUs this pays for more than 64 rows. Fewer are bound by reading the weights, so they use the W8A16 kernel of
`linear_int8`, which has small tiles and splits the inner dimension and does not round x.

Native, on a CPU: for up to 16 rows the weights are read once from memory; for more, they are laid out in panels
(`native/panels.h`). A panel of a pair has 16 outputs of each weight, fused in registers. Without AVX2 torch's int8
product multiplies many rows.

Source: Dettmers et al. 2022, arXiv:2208.07339 (per-token, per-channel int8).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .configs import Configs
from .few_rows import few_rows
from .linear_int8 import check_int8, w8a16_triton
from .native import products
from .packed_product import (
    FEW_CPU_ROWS,
    SMALL_MEMORY,
    PackedProduct,
    add_epilogue,
    block_of,
    has_few_rows,
    launch_rounded_product,
    misfit,
    store_block,
    tile_config,
    two_products,
)
from .packed_weight import Packed
from .quantize_rows import quantize_rows
from .quantize_rows import reference as quantize_rows_reference
from .row_groups import any_rows
from .strides import as_rows
from .triton_language import tl, triton


def linear_w8a8_reference(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The specification of `linear_w8a8`: tokens quantized as by `quantize_rows`, the rest in float64."""
    codes, row_scales = quantize_rows_reference(x)
    y = (codes.double() @ weight.codes.double().T) * row_scales.double()[..., None] * weight.scales.double()
    return add_epilogue(y, bias, residual).to(x.dtype)


@triton.jit(do_not_specialize=["rows"])
def _w8a8_kernel(  # type: ignore[no-untyped-def]
    codes,
    row_scales,
    weight,
    scales,
    bias,
    residual,
    out,
    rows,
    columns,
    inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    m, n = block_of(rows, columns, BLOCK_M, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(m, rows - 1).to(tl.int64)
    channel = tl.minimum(n, columns - 1).to(tl.int64)
    tokens = codes + row[None, :] * inner + k[:, None]
    channels = weight + channel[:, None] * inner + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for first in range(0, inner, BLOCK_K):
        if EVEN:
            acc = tl.dot(tl.load(channels + first), tl.load(tokens + first), acc, out_dtype=tl.int32)
        else:
            left = inner - first
            tile = tl.load(channels + first, mask=k[None, :] < left, other=0)
            acc = tl.dot(tile, tl.load(tokens + first, mask=k[:, None] < left, other=0), acc, out_dtype=tl.int32)
    wide = acc.to(tl.float32) * tl.load(scales + channel).to(tl.float32)[:, None] * tl.load(row_scales + row)[None, :]
    store_block(wide, out, bias, residual, m, n, rows, columns)


_CONFIGS = Configs(
    "linear_w8a8",
    tile_config(128, 128, 128, 8, 4),
    {chip: tile_config(128, 128, 64, 8, 4) for chip in SMALL_MEMORY},
)
W8A8 = PackedProduct("linear_w8a8", linear_w8a8_reference, check_int8, w8a16_triton)


@W8A8.implementation("triton", groups=any_rows)
def _triton(x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if has_few_rows(x):
        return w8a16_triton(x, weight, up, bias, residual)
    rounded, config = quantize_rows(as_rows(x)), _CONFIGS.on(x.device)
    even = x.shape[-1] % config.blocks["BLOCK_K"] == 0

    def linear(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return launch_rounded_product(_w8a8_kernel, x, rounded, weight[:2], bias, residual, config, EVEN=even)

    return two_products(linear)(x, weight, up, bias, residual)


@W8A8.implementation("native", misfit, few_rows)
def _native(x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    rows = as_rows(x)
    if rows.shape[0] > FEW_CPU_ROWS and not products.has_panels():
        return _torch(x, weight, up, bias, residual)
    y = products.product("linear_w8a8", rows, weight, up, bias, residual)
    return y.view(*x.shape[:-1], len(weight.codes))


@W8A8.implementation("torch")
def _torch(x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    codes, row_scales = quantize_rows(as_rows(x))

    def linear(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = _int_product(codes, weight.codes).float() * row_scales[:, None] * weight.scales.float()
        return add_epilogue(y.view(*x.shape[:-1], len(weight.codes)), bias, residual).to(x.dtype)

    return two_products(linear)(x, weight, up, bias, residual)


def _int_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T, exactly. torch's int8 product on GPUs needs more than 16 rows and multiples of 8."""
    if len(b) % 8 or a.shape[1] % 8:
        return a.double() @ b.double().T
    rows = len(a)
    if rows < 17:
        a = F.pad(a, (0, 0, 0, 17 - rows))
    return torch._int_mm(a, b.T)[:rows]


def linear_w8a8(x: Tensor, weight: Packed, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Like `linear_int8`, with each token of x rounded to int8 (W8A8): faster for many rows, less exact.

    On GPUs the kernel of `linear_int8` multiplies up to 64 rows, without rounding x.
    """
    return W8A8.linear(x, weight, bias, residual)


def linear_w8a8_swiglu(x: Tensor, gate: Packed, up: Packed) -> Tensor:
    """silu(x G^T) * (x U^T), with x rounded to int8 once. gate, up: same shape; all else as in `linear_w8a8`."""
    return W8A8.swiglu(x, gate, up)
