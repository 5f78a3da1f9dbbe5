"""Linear layers with int8 weights: W8A16, alone or as a SwiGLU pair.

    W8A16    y[m, n] = scales[n] * sum_k x[m, k] * codes[n, k] + bias[n] + residual[m, n]
    SwiGLU   y       = silu(gate(x)) * up(x), two W8A16 products of one x

x: [rows, in] float16, bfloat16 or float32; weight: codes [out, in] int8, scales [out]. Sums and epilogues are float32
and are rounded to the dtype of x once.

W8A16 is bound by memory up to about 100 rows. A launch reads out * in bytes of weights (half those of 16 bits) once for
every BLOCK_M rows, that is once up to 64 rows; every block of outputs reads x from L2. The int8 weights are converted
exactly to the dtype of x in registers, and the channel's scale multiplies the finished sum, so no rounding of weights
is added. The weights are the left operand of the tensor core's product (which Hopper reads from registers), the tokens
its columns. FLOPs: 2 * rows * out * in. For few rows the inner dimension is split, see `packed_product`.

Native, on a CPU: for up to 16 rows the weights are read once from memory. From AVX-VNNI on, the kernel multiplies
integers, with 256 neighbouring activations as 15-bit integers with one scale; on other CPUs weights are converted to
float32 in registers. For more rows, weights are unpacked a panel at a time in the L1 cache (`native/panels.h`), to
bfloat16 where the CPU multiplies it fast, else to the same integers (from AVX2 on). A panel of a SwiGLU pair has 16
outputs of each weight, fused in registers. Without AVX2 torch multiplies, with weights made dense a tile at a time.

Source: Dettmers et al. 2022, arXiv:2208.07339 (per-channel int8).
"""

import torch
from torch import Tensor

from .arguments import FLOATING, check_tensors
from .configs import Configs
from .e4m3 import readable, widened
from .few_rows import few_int8_rows
from .packed_product import (
    SMALL_MEMORY,
    AddNorm,
    NativeProduct,
    PackedProduct,
    add_epilogue,
    block_of,
    config_for,
    launch_product,
    linear_by_tiles,
    misfit,
    product_by_tiles,
    store_product,
    tile_config,
    two_products,
)
from .packed_weight import Packed
from .row_groups import any_rows
from .strides import as_rows
from .triton_language import tl, triton


def linear_int8_reference(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The specification of `linear_int8`, in float64."""
    y = x.double() @ (weight.codes.double() * weight.scales.double()[:, None]).T
    return add_epilogue(y, bias, residual).to(x.dtype)


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
    partials,
    counters,
    norm,
    rows,
    columns,
    inner,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    ROW: tl.constexpr,
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
            tile = tl.load(weight + codes + first, mask=k[None, :] < left, other=0.0)
        acc = tl.dot(widened(tile, x), tokens, acc, input_precision="ieee")
        if up is not None:
            if EVEN:
                tile = tl.load(up + codes + first)
            else:
                tile = tl.load(up + codes + first, mask=k[None, :] < inner - first, other=0.0)
            up_acc = tl.dot(widened(tile, x), tokens, up_acc, input_precision="ieee")
    if scales is not None:
        acc *= tl.load(scales + channel).to(tl.float32)[:, None]
    if up_scales is not None:
        up_acc *= tl.load(up_scales + channel).to(tl.float32)[:, None]
    store_product(acc, up, up_acc, out, partials, counters, bias, residual, norm, m, n, rows, columns, ROW)


# Keys: the most rows that a config is for; the last also serves more.
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
# A pair has two sums for each output, so registers hold half as many outputs.
_W8A16_PAIR = {
    **_W8A16,
    32: Configs("linear_int8_pair_32", tile_config(32, 64, 128, 4, 4), {"gfx942": tile_config(32, 64, 128, 4, 3)}),
    64: Configs("linear_int8_pair_64", tile_config(64, 64, 128, 4, 3), {"sm86": tile_config(64, 64, 128, 8, 3)}),
    128: Configs(
        "linear_int8_pair_128",
        tile_config(128, 64, 64, 8, 3),
        dict.fromkeys(("sm90", "sm100"), tile_config(128, 128, 64, 8, 4)),
    ),
}

# Converting e4m3 takes more registers than converting int8.
_E4M3 = {
    **_W8A16,
    16: Configs("linear_fp8_16", tile_config(16, 64, 128, 4, 4), {"sm89": tile_config(16, 64, 64, 4, 4)}),
}
_E4M3_PAIR = {
    **_W8A16_PAIR,
    64: Configs(
        "linear_fp8_pair_64",
        tile_config(64, 64, 64, 4, 3),
        dict.fromkeys(("sm90", "sm100"), tile_config(64, 64, 128, 4, 3)),
    ),
}

# A float32 weight takes four times the shared memory of an int8 one.
_DENSE = {16: Configs("linear_few", tile_config(16, 64, 64, 4, 4))}


def w8a16_triton(
    x: Tensor,
    weight: Packed,
    up: Packed | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: AddNorm | None = None,
) -> Tensor:
    """The product on a GPU, with codes in int8 or in e4m3 that are not NaN. norm: see `linear_norm`."""
    if weight.codes.dtype == torch.int8:
        table = _W8A16 if up is None else _W8A16_PAIR
    else:
        table = _E4M3 if up is None else _E4M3_PAIR
    config, parts = config_for(table, x.shape[:-1].numel(), x.device), (_readable(weight), up and _readable(up))
    even = x.shape[-1] % config.blocks["BLOCK_K"] == 0
    kernel, owner = _w8a16_kernel, weight.codes
    return launch_product(kernel, x, *parts, bias, residual, config, owner=owner, norm=norm, EVEN=even)


def _readable(weight: Packed) -> tuple[Tensor, Tensor]:
    """The codes as Triton can read them on this chip, and the scales."""
    return readable(weight.codes), weight.scales


def dense_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias on a GPU, with a dense weight in the dtype of x, by the same kernel."""
    config = config_for(_DENSE, x.shape[:-1].numel(), x.device)
    even = x.shape[-1] % config.blocks["BLOCK_K"] == 0
    return launch_product(_w8a16_kernel, x, (weight, None), None, bias, None, config, owner=weight, EVEN=even)


INPUT_MULTIPLE = 16
"""Products with one scale per channel take inputs in multiples of this."""


def check_int8(x: Tensor, weight: Packed, dtype: torch.dtype = torch.int8) -> None:
    """Raise ValueError unless x [..., in], a weight with codes [out, in] in `dtype`, and its scales [out] fit."""
    codes, scales, _ = weight
    if codes.dtype != dtype or codes.ndim != 2 or not codes.is_contiguous():
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"the weight must be contiguous {kind} [out, in], got {codes.dtype} {tuple(codes.shape)}")
    if not x.is_floating_point() or x.shape[-1:] != codes.shape[1:]:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; a weight {tuple(codes.shape)} takes [..., in] floating")
    if codes.shape[1] % INPUT_MULTIPLE or codes.shape[1] == 0:
        raise ValueError(f"weights of 8 bits need a multiple of {INPUT_MULTIPLE} inputs, got {codes.shape[1]}")
    if scales.shape != codes.shape[:1] or not scales.is_floating_point() or not scales.is_contiguous():
        raise ValueError(f"scales must be contiguous floating [{len(codes)}], got {scales.dtype} {tuple(scales.shape)}")
    check_tensors(x, (dtype,), weight=codes)
    check_tensors(x, FLOATING, x=x, scales=scales)


INT8 = PackedProduct("linear_int8", linear_int8_reference, check_int8, w8a16_triton)
INT8.implementation("triton", groups=any_rows)(w8a16_triton)
INT8.implementation("native", misfit, few_int8_rows)(NativeProduct("int8", grouped=False))

# torch on a CPU: up to here its int8 kernel is faster than widening the weights for a dense product
# (docs/quantization.md).
MOST_ROWS_INT8 = 32


@INT8.implementation("torch")
@two_products
def _torch(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    rows, (codes, scales, _) = as_rows(x), weight
    if x.dtype == torch.float16:  # sums of 127 * x overflow float16
        return linear_by_tiles(x, weight, lambda tile: dequantized(tile.codes, tile.scales, x.dtype), bias, residual)
    if x.dtype == torch.bfloat16 and rows.shape[0] <= MOST_ROWS_INT8:
        y = torch._weight_int8pack_mm(rows, codes, torch.ones_like(scales, dtype=x.dtype))
    else:
        y = product_by_tiles(rows, len(codes), lambda tile: codes[tile].to(x.dtype))
    y = (y.float() * scales.float()).view(*x.shape[:-1], len(codes))
    return add_epilogue(y, bias, residual).to(x.dtype)


def dequantized(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * scales of [out, in] in `dtype`, rounded once."""
    return (weight.float() * scales.float()[:, None]).to(dtype)


def linear_int8(x: Tensor, weight: Packed, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual with int8 weights, W[n, k] = scales[n] * codes[n, k] (W8A16).

    x: [..., in] floating, in a multiple of 16; weight: codes [out, in] int8, scales [out]; bias: [out]; residual:
    [..., out] in the dtype of x. Returns [..., out] in the dtype of x.
    Raises ValueError when shapes or dtypes do not fit, as all linear operations here do.
    """
    return INT8.linear(x, weight, bias, residual)


def linear_int8_swiglu(x: Tensor, gate: Packed, up: Packed) -> Tensor:
    """silu(x G^T) * (x U^T) with int8 weights, x read once. gate, up: same shape; all else as in `linear_int8`."""
    return INT8.swiglu(x, gate, up)
