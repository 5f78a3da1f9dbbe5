"""Linear layers with weights in the 8-bit float e4m3, alone or as a SwiGLU pair.

    W8A8     q[m], s[m] = x[m] rounded to e4m3 with one scale per token (`quantize_rows`)
             y[m, n] = scales[n] * s[m] * sum_k q[m, k] * codes[n, k] + bias[n] + residual[m, n]
    W8A16    y[m, n] = scales[n] * sum_k x[m, k] * codes[n, k] + bias[n] + residual[m, n]
    SwiGLU   y = silu(gate(x)) * up(x), two such products of one x

x: [rows, in] float16, bfloat16 or float32; weight: codes [out, in] float8_e4m3fn, scales [out]. The epilogue is float32
and is rounded to the dtype of x once. For a pair of many rows, gate and up are rounded, too.

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

import torch
from torch import Tensor

from .chips import CHIPS
from .configs import Configs, family
from .device_state import runs_triton
from .e4m3 import widen
from .linear_int8 import check_int8, w8a16_triton
from .packed_product import (
    SMALL_MEMORY,
    PackedProduct,
    add_epilogue,
    block_of,
    has_few_rows,
    launch_rounded_product,
    product_by_tiles,
    store_block,
    tile_config,
    two_products,
)
from .packed_weight import Packed
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


def linear_fp8_reference(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The specification of `linear_fp8`: tokens quantized as by `quantize_rows` if at all, the rest in float64."""
    if rounds_inputs(x):
        codes, row_scales = quantize_rows_reference(x, E4M3)
        tokens = codes.double() * row_scales.double()[..., None]
    else:
        tokens = x.double()
    y = tokens @ (weight.codes.double() * weight.scales.double()[:, None]).T
    return add_epilogue(y, bias, residual).to(x.dtype)


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


def check_fp8(x: Tensor, weight: Packed) -> None:
    """Raise ValueError unless x [..., in], a weight with codes [out, in] in e4m3, and its scales [out] fit."""
    check_int8(x, weight, E4M3)


FP8 = PackedProduct("linear_fp8", linear_fp8_reference, check_fp8, w8a16_triton)


@FP8.implementation("triton", groups=any_rows)
def _triton(x: Tensor, weight: Packed, up: Packed | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if not rounds_inputs(x):
        return w8a16_triton(x, weight, up, bias, residual)
    rounded, config = quantize_rows(as_rows(x), E4M3), _CONFIGS.on(x.device)
    options = {
        "EVEN": x.shape[-1] % config.blocks["BLOCK_K"] == 0,
        "PROMOTE": family(x.device) not in _FLOAT32_SUMS,
    }

    def linear(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return launch_rounded_product(_fp8_kernel, x, rounded, weight[:2], bias, residual, config, **options)

    return two_products(linear)(x, weight, up, bias, residual)


@FP8.implementation("torch")
@two_products
def _torch(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    rows, columns = as_rows(x), len(weight.codes)
    factors = weight.scales.float()
    if rounds_inputs(x):
        codes, row_scales = quantize_rows(rows, E4M3)
        rows, factors = codes.to(x.dtype), row_scales[:, None] * factors
    if x.dtype == torch.float16:  # sums of 448 * 448 overflow float16
        rows = rows.float()
    y = product_by_tiles(rows, columns, lambda tile: widen(weight.codes[tile], rows.dtype)).float() * factors
    return add_epilogue(y.view(*x.shape[:-1], columns), bias, residual).to(x.dtype)


def linear_fp8(x: Tensor, weight: Packed, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual with weights in e4m3, W[n, k] = scales[n] * codes[n, k].

    x: [..., in] floating, in a multiple of 16, rounded to e4m3 if `rounds_inputs(x)`; weight: codes [out, in]
    float8_e4m3fn, scales [out]; bias: [out]; residual: [..., out] in the dtype of x. Returns [..., out] in the dtype of
    x. Raises ValueError when shapes or dtypes do not fit.
    """
    return FP8.linear(x, weight, bias, residual)


def linear_fp8_swiglu(x: Tensor, gate: Packed, up: Packed) -> Tensor:
    """silu(x G^T) * (x U^T), with x rounded at most once. gate, up: same shape; all else as in `linear_fp8`."""
    return FP8.swiglu(x, gate, up)
