"""Linear layers with int8 weights and int8 activations (W8A8), alone or as a SwiGLU pair.

    q[m], s[m] = x[m] rounded to int8 with one scale per token (`quantize_rows`)
    y[m, n] = scales[n] * s[m] * sum_k q[m, k] * weight[n, k] + bias[n] + residual[m, n]    the sum exact, in int32
    SwiGLU    y = silu(gate(x)) * up(x), two such products of one q

weight, scales: as in `linear_int8`; x: [rows, in] float16, bfloat16 or float32. The epilogue is float32 and is rounded
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

from . import activation
from .configs import Configs
from .dispatch import Operation
from .few_rows import few_rows
from .linear_int8 import check_pair, check_weight, w8a16_triton
from .native import products
from .packed_product import (
    FEW_CPU_ROWS,
    SMALL_MEMORY,
    add_epilogue,
    block_of,
    check_epilogue,
    has_few_rows,
    launch_rounded_product,
    misfit,
    store_block,
    swiglu_reference_of,
    tile_config,
)
from .quantize_rows import quantize_rows
from .quantize_rows import reference as quantize_rows_reference
from .row_groups import any_rows
from .strides import as_rows
from .triton_language import tl, triton


def linear_w8a8_reference(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The specification of `linear_w8a8`: tokens quantized as by `quantize_rows`, the rest in float64."""
    codes, row_scales = quantize_rows_reference(x)
    y = (codes.double() @ weight.double().T) * row_scales.double()[..., None] * scales.double()
    return add_epilogue(y, bias, residual).to(x.dtype)


def linear_w8a8_swiglu_reference(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    """The specification of `linear_w8a8_swiglu`: two products of `linear_w8a8`, rounded to the dtype of x once."""
    return swiglu_reference_of(linear_w8a8_reference, x, (gate, gate_scales), (up, up_scales))


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
_linear = Operation("linear_w8a8", linear_w8a8_reference, rows=(0, 4))
_swiglu = Operation("linear_w8a8_swiglu", linear_w8a8_swiglu_reference, rows=(0,))


@_linear.implementation("triton", groups=any_rows)
def _linear_triton(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if has_few_rows(x):
        return w8a16_triton(x, (weight, scales), (None, None), bias, residual)
    y = _product_triton(*quantize_rows(as_rows(x)), weight, scales, bias, residual, x.dtype)
    return y.view(*x.shape[:-1], len(weight))


@_swiglu.implementation("triton", groups=any_rows)
def _swiglu_triton(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    if has_few_rows(x):
        return w8a16_triton(x, (gate, gate_scales), (up, up_scales), None, None)
    rounded = quantize_rows(as_rows(x))
    gated = _product_triton(*rounded, gate, gate_scales, None, None, x.dtype)
    raised = _product_triton(*rounded, up, up_scales, None, None, x.dtype)
    return activation.swiglu(gated, raised).view(*x.shape[:-1], len(gate))


def _product_triton(
    codes: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    config = _CONFIGS.on(codes.device)
    even = codes.shape[1] % config.blocks["BLOCK_K"] == 0
    weights = weight, scales
    return launch_rounded_product(_w8a8_kernel, codes, row_scales, weights, bias, residual, dtype, config, EVEN=even)


@_linear.implementation("native", misfit, few_rows)
def _linear_native(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    rows = as_rows(x)
    if rows.shape[0] > FEW_CPU_ROWS and not products.has_panels():
        return _linear_torch(x, weight, scales, bias, residual)
    return products.w8a8_product(rows, (weight, scales), None, bias, residual).view(*x.shape[:-1], len(weight))


@_swiglu.implementation("native", misfit, few_rows)
def _swiglu_native(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    rows = as_rows(x)
    if rows.shape[0] > FEW_CPU_ROWS and not products.has_panels():
        return _swiglu_torch(x, gate, gate_scales, up, up_scales)
    y = products.w8a8_product(rows, (gate, gate_scales), (up, up_scales), None, None)
    return y.view(*x.shape[:-1], len(gate))


@_linear.implementation("torch")
def _linear_torch(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = _scaled_product(*quantize_rows(as_rows(x)), weight, scales)
    return add_epilogue(y.view(*x.shape[:-1], len(weight)), bias, residual).to(x.dtype)


@_swiglu.implementation("torch")
def _swiglu_torch(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    rounded = quantize_rows(as_rows(x))
    gated, raised = (
        _scaled_product(*rounded, w, scales).to(x.dtype) for w, scales in ((gate, gate_scales), (up, up_scales))
    )
    return activation.swiglu(gated, raised).view(*x.shape[:-1], len(gate))


def _scaled_product(codes: Tensor, row_scales: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return _int_product(codes, weight).float() * row_scales[:, None] * scales.float()


def _int_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T, exactly. torch's int8 product on GPUs needs more than 16 rows and multiples of 8."""
    if len(b) % 8 or a.shape[1] % 8:
        return a.double() @ b.double().T
    rows = len(a)
    if rows < 17:
        a = F.pad(a, (0, 0, 0, 17 - rows))
    return torch._int_mm(a, b.T)[:rows]


def linear_w8a8(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Like `linear_int8`, with each token of x rounded to int8 (W8A8): faster for many rows, less exact.

    On GPUs the kernel of `linear_int8` multiplies up to 64 rows, without rounding x.
    """
    check_weight(x, weight, scales)
    check_epilogue(x, len(weight), bias, residual)
    return _linear.on(x.device)(x, weight, scales, bias, residual)


def linear_w8a8_swiglu(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    """silu(x G^T) * (x U^T), with x rounded to int8 once. gate, up: same shape; all else as in `linear_w8a8`."""
    check_pair(x, gate, gate_scales, up, up_scales)
    return _swiglu.on(x.device)(x, gate, gate_scales, up, up_scales)
