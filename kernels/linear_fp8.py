"""Linear layers with weights in the 8-bit float e4m3, alone or as a SwiGLU pair.

    W8A8     q[m], s[m] = x[m] rounded to e4m3 with one scale per token (`quantize_rows`)
             y[m, n] = scales[n] * s[m] * sum_k q[m, k] * weight[n, k] + bias[n] + residual[m, n]
    W8A16    y[m, n] = scales[n] * sum_k x[m, k] * weight[n, k] + bias[n] + residual[m, n]
    SwiGLU   y = silu(gate(x)) * up(x), two such products of one x

x: [rows, in] float16, bfloat16 or float32; weight: [out, in] float8_e4m3fn; scales: [out]. The epilogue is float32 and
is rounded to the dtype of x once. For a pair of many rows, gate and up are rounded, too.

More than 64 rows are multiplied as W8A8. 2 * rows * out * in operations, at twice the 16-bit rate; bytes: out * in of
the weight, rows * in of the codes. The tensor cores of sm_89 and sm_90 add products of e4m3 in fewer bits than float32
has, so the sums of 64 or 128 inputs at a time are added in float32 registers; those of sm_100 add in float32.

Up to 64 rows are bound by reading the weights, out * in bytes, and use the W8A16 kernel of `linear_int8`, which
converts the weights exactly to the dtype of x in registers and does not round x. So do products of any number of rows
on GPUs whose tensor cores do not multiply e4m3 (sm_80, sm_86), or have another 8-bit float (gfx942).

On a CPU, and for a torch backend anywhere, the codes are converted to the dtype of x a tile of channels at a time for a
dense product: e4m3 saves memory there, and no time; int8 is faster.

Source: Micikevicius et al. 2022, arXiv:2209.05433 (e4m3); DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2 (sums on
sm_90).
"""

from functools import cache

import torch
from torch import Tensor

from . import activation
from .chips import CHIPS
from .configs import Configs, family
from .device_state import runs_triton
from .dispatch import Operation
from .linear_int8 import check_pair, check_weight, w8a16_triton
from .packed_product import (
    SMALL_MEMORY,
    add_epilogue,
    block_of,
    check_epilogue,
    has_few_rows,
    launch_rounded_product,
    product_by_tiles,
    store_block,
    swiglu_of,
    swiglu_reference_of,
    tile_config,
)
from .quantize_rows import E4M3, quantize_rows
from .quantize_rows import reference as quantize_rows_reference
from .row_groups import any_rows
from .strides import as_rows
from .triton_language import tl, triton


def rounds_inputs(x: Tensor) -> bool:
    """Whether the product rounds x [..., in] to e4m3: x has more than 64 rows and is not on a GPU that cannot multiply
    e4m3."""
    old = x.device.type == "cuda" and not runs_triton(x.device)
    return not has_few_rows(x) and not old and CHIPS[family(x.device)].e4m3


def linear_fp8_reference(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The specification of `linear_fp8`: tokens quantized as by `quantize_rows` if at all, the rest in float64."""
    if rounds_inputs(x):
        codes, row_scales = quantize_rows_reference(x, E4M3)
        tokens = codes.double() * row_scales.double()[..., None]
    else:
        tokens = x.double()
    y = tokens @ (weight.double() * scales.double()[:, None]).T
    return add_epilogue(y, bias, residual).to(x.dtype)


def linear_fp8_swiglu_reference(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    """The specification of `linear_fp8_swiglu`: two products of `linear_fp8`, rounded to the dtype of x once."""
    return swiglu_reference_of(linear_fp8_reference, x, (gate, gate_scales), (up, up_scales))


@triton.jit(do_not_specialize=["rows"])
def _fp8_kernel(  # type: ignore[no-untyped-def]
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
    PROMOTE: tl.constexpr,
):
    m, n = block_of(rows, columns, BLOCK_M, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(m, rows - 1).to(tl.int64)
    channel = tl.minimum(n, columns - 1).to(tl.int64)
    tokens = codes + row[None, :] * inner + k[:, None]
    channels = weight + channel[:, None] * inner + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, inner, BLOCK_K):
        if EVEN:
            part = tl.load(tokens + first)
            tile = tl.load(channels + first)
        else:
            left = inner - first
            part = tl.load(tokens + first, mask=k[:, None] < left, other=0.0)
            tile = tl.load(channels + first, mask=k[None, :] < left, other=0.0)
        if PROMOTE:
            acc += tl.dot(tile, part, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(tile, part, acc)
    wide = acc * tl.load(scales + channel).to(tl.float32)[:, None] * tl.load(row_scales + row)[None, :]
    store_block(wide, out, bias, residual, m, n, rows, columns)


_CONFIGS = Configs(
    "linear_fp8",
    tile_config(128, 128, 128, 8, 4),
    {chip: tile_config(128, 128, 64, 8, 4) for chip in SMALL_MEMORY},
)
_FLOAT32_SUMS = ("sm100",)  # tensor cores that add products of e4m3 in float32
_NO_E4M3 = ("sm80", "sm86")  # for which Triton has no e4m3 type
_linear = Operation("linear_fp8", linear_fp8_reference, rows=(0, 4))
_swiglu = Operation("linear_fp8_swiglu", linear_fp8_swiglu_reference, rows=(0,))


@_linear.implementation("triton", groups=any_rows)
def _linear_triton(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if not rounds_inputs(x):
        return w8a16_triton(x, (readable(weight), scales), (None, None), bias, residual, owner=weight)
    y = _product_triton(*quantize_rows(as_rows(x), E4M3), weight, scales, bias, residual, x.dtype)
    return y.view(*x.shape[:-1], len(weight))


@_swiglu.implementation("triton", groups=any_rows)
def _swiglu_triton(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    if not rounds_inputs(x):
        pair = (readable(gate), gate_scales), (readable(up), up_scales)
        return w8a16_triton(x, *pair, None, None, owner=gate)
    rounded = quantize_rows(as_rows(x), E4M3)
    gated = _product_triton(*rounded, gate, gate_scales, None, None, x.dtype)
    raised = _product_triton(*rounded, up, up_scales, None, None, x.dtype)
    return activation.swiglu(gated, raised).view(*x.shape[:-1], len(gate))


def readable(weight: Tensor) -> Tensor:
    """The codes as Triton can read them on this chip."""
    return weight.view(torch.uint8) if family(weight.device) in _NO_E4M3 else weight


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
    options = {
        "EVEN": codes.shape[1] % config.blocks["BLOCK_K"] == 0,
        "PROMOTE": family(codes.device) not in _FLOAT32_SUMS,
    }
    weights = weight, scales
    return launch_rounded_product(_fp8_kernel, codes, row_scales, weights, bias, residual, dtype, config, **options)


@_linear.implementation("torch")
def _linear_torch(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    rows, columns = as_rows(x), len(weight)
    factors = scales.float()
    if rounds_inputs(x):
        codes, row_scales = quantize_rows(rows, E4M3)
        rows, factors = codes.to(x.dtype), row_scales[:, None] * factors
    if x.dtype == torch.float16:  # sums of 448 * 448 overflow float16
        rows = rows.float()
    y = product_by_tiles(rows, columns, lambda tile: _widened(weight[tile], rows.dtype)).float() * factors
    return add_epilogue(y.view(*x.shape[:-1], columns), bias, residual).to(x.dtype)


@_swiglu.implementation("torch")
def _swiglu_torch(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    return swiglu_of(_linear_torch, x, (gate, gate_scales), (up, up_scales))


def _widened(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes in `dtype`, exactly. A table is five times as fast on a CPU as torch's conversion."""
    return _values(codes.device, dtype).index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


@cache
def _values(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values of the 256 codes."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).to(dtype)


def linear_fp8(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x W^T + bias + residual with weights in e4m3, W[n, k] = scales[n] * weight[n, k].

    x: [..., in] floating, in a multiple of 16, rounded to e4m3 if `rounds_inputs(x)`; weight: [out, in] float8_e4m3fn;
    scales: [out]; bias: [out]; residual: [..., out] in the dtype of x. Returns [..., out] in the dtype of x.
    Raises ValueError when shapes or dtypes do not fit.
    """
    check_weight(x, weight, scales, E4M3)
    check_epilogue(x, len(weight), bias, residual)
    return _linear.on(x.device)(x, weight, scales, bias, residual)


def linear_fp8_swiglu(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    """silu(x G^T) * (x U^T), with x rounded at most once. gate, up: same shape; all else as in `linear_fp8`."""
    check_pair(x, gate, gate_scales, up, up_scales, E4M3)
    return _swiglu.on(x.device)(x, gate, gate_scales, up, up_scales)
