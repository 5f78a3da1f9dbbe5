"""Linear layers with int3 weights in groups (W3A16), alone or as a SwiGLU pair.

    y[m, n] = sum_k x[m, k] * scales[n, g] * (code[n, k] - 8) + bias[n] + residual[m, n],    g = k // group
    SwiGLU: y = silu(gate(x)) * up(x), two such products of one x

x: [rows, in] float16, bfloat16 or float32, in a multiple of 128; codes: [out, 3 * in / 8] uint8; scales: [out, in /
group], groups of 32, 64 or 128 inputs. The codes are even, 0, 2 .. 14: int3 weights are int4 weights (`linear_int4`),
stored denser. Sums and epilogues are float32 and are rounded to the dtype of x once.

Layout: 128 inputs of a channel take 48 bytes, the first three quarters of the 64 bytes that they take in int4. The
lowest bit of an even code is spare. Byte i of a quarter holds, in the spare bits of its two codes, a bit of the two
codes of byte i of the last quarter: the first quarter their bits 1, the second their bits 2, the third their bits 3.

A launch reads out * in * (3/8 + 2 / group) bytes of codes and 16-bit scales once for every BLOCK_M rows; 2 * rows *
out * in FLOPs. Eight codes take three instructions to become a word of int4 codes, and each weight about three more:
as in `linear_int4`, the code is or-ed into the mantissa of 2^23. The scale multiplies a group's sum. A block of inputs
is four products of 32 inputs; inner dimensions are split as in `packed_product`.

Native, on a CPU: as `linear_int4`, and with the same results. Without kernels weights are made dense a tile of channels
at a time.
"""

import torch
from torch import Tensor

from .arguments import FLOATING, check_tensors
from .configs import Configs
from .few_rows import few_rows
from .linear_int4 import GROUP_SIZES, in_words
from .linear_int4 import unpacked as unpacked_int4
from .packed_product import (
    AddNorm,
    NativeProduct,
    PackedProduct,
    add_epilogue,
    block_of,
    by_tiles,
    check_groups,
    config_for,
    grouped_misfit,
    launch_product,
    store_product,
    tile_config,
)
from .packed_weight import Packed
from .row_groups import any_rows
from .triton_language import tl, triton

BLOCK_SIZE = 128
"""Inputs that are stored together, in BLOCK_BYTES."""
BLOCK_BYTES = 48


def unpack_int3(packed: Tensor) -> Tensor:
    """The int4 layout of the codes: [out, in / 2] uint8."""
    quarters = packed.unflatten(1, (-1, 3, 16))
    spare = quarters & 0x11
    last = spare[:, :, 0] << 1 | spare[:, :, 1] << 2 | spare[:, :, 2] << 3
    return torch.cat((quarters & 0xEE, last[:, :, None]), 2).flatten(1)


def unpacked(weight: Packed) -> Tensor:
    """The weights [out, in], in float32, or float64 if the scales are."""
    return unpacked_int4(weight._replace(codes=unpack_int3(weight.codes)))


def linear_int3_reference(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The specification of `linear_int3`, in float64."""
    return add_epilogue(x.double() @ unpacked(weight.wide()).T, bias, residual).to(x.dtype)


@triton.jit
def _numbers(words, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """code - 8 of int32 words [BLOCK_N, 4] with eight codes each: [BLOCK_N, 32], exact in DTYPE."""
    codes = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    numbers = (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0  # 2^23 + 8
    return tl.reshape(numbers.to(DTYPE), (words.shape[0], 8 * words.shape[1]))


@triton.jit
def _add_quarter(acc, tokens, first, second, third, QUARTER: tl.constexpr, scales):  # type: ignore[no-untyped-def]
    """acc + the product of tokens [32, BLOCK_M] with a quarter of a block, of which three are stored; scales: of its
    group, [BLOCK_N] addresses."""
    EVEN: tl.constexpr = -286331154  # 0xEEEEEEEE
    SPARE: tl.constexpr = 286331153  # 0x11111111
    if QUARTER == 0:
        words = first & EVEN
    elif QUARTER == 1:
        words = second & EVEN
    elif QUARTER == 2:
        words = third & EVEN
    else:
        words = ((first & SPARE) << 1) | ((second & SPARE) << 2) | ((third & SPARE) << 3)
    weights = _numbers(words, tokens.dtype)
    return acc + tl.dot(weights, tokens, input_precision="ieee") * tl.load(scales).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["rows", "steps"])
def _w3a16_kernel(  # type: ignore[no-untyped-def]
    x,
    words,
    scales,
    up_words,
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
    GROUP: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """words: [out, 12 * in / 128] int32. BLOCK_K: 128."""
    m, n = block_of(rows, columns, BLOCK_M, BLOCK_N)
    channel = tl.minimum(n, columns - 1).to(tl.int64)
    xs = x + m[None, :].to(tl.int64) * inner + tl.arange(0, BLOCK_K // 4)[:, None]
    at = channel[:, None] * (inner // BLOCK_K * 12) + tl.arange(0, 4)[None, :]
    groups = channel * (inner // GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = tl.program_id(1) * steps * BLOCK_K
    for k in range(start, tl.minimum(start + steps * BLOCK_K, inner), BLOCK_K):
        here = words + at + k // BLOCK_K * 12
        first, second, third = tl.load(here), tl.load(here + 4), tl.load(here + 8)
        if up_words is not None:
            up_here = up_words + at + k // BLOCK_K * 12
            up_first, up_second, up_third = tl.load(up_here), tl.load(up_here + 4), tl.load(up_here + 8)
        for quarter in tl.static_range(4):
            inputs = k + quarter * (BLOCK_K // 4)
            tokens = tl.load(xs + inputs, mask=m[None, :] < rows, other=0)
            group = groups + inputs // GROUP
            acc = _add_quarter(acc, tokens, first, second, third, quarter, scales + group)
            if up_words is not None:
                up_acc = _add_quarter(up_acc, tokens, up_first, up_second, up_third, quarter, up_scales + group)
    store_product(acc, up_words, up_acc, out, partials, counters, bias, residual, norm, m, n, rows, columns, ROW)


# Keys: the largest number of rows of a config; the last config also serves more.
_W3A16 = {
    16: Configs("linear_int3_16", tile_config(16, 64, BLOCK_SIZE, 4, 3)),
    64: Configs("linear_int3_64", tile_config(64, 64, BLOCK_SIZE, 4, 2)),
}
# A pair has two sums for each output.
_W3A16_PAIR = {**_W3A16, 64: Configs("linear_int3_pair_64", tile_config(32, 64, BLOCK_SIZE, 8, 2))}


def w3a16_triton(
    x: Tensor,
    weight: Packed,
    up: Packed | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: AddNorm | None = None,
) -> Tensor:
    """The product on a GPU. norm: see `linear_norm`."""
    config = config_for(_W3A16 if up is None else _W3A16_PAIR, x.shape[:-1].numel(), x.device)
    group = x.shape[-1] // weight.scales.shape[1]
    kernel, owner, parts = _w3a16_kernel, weight.codes, (in_words(weight), up and in_words(up))
    return launch_product(kernel, x, *parts, bias, residual, config, owner=owner, norm=norm, GROUP=group)


def check_int3(x: Tensor, weight: Packed) -> None:
    """Raise ValueError unless x [..., in] and a weight are valid for `linear_int3`."""
    codes, scales, _ = weight
    if codes.dtype != torch.uint8 or codes.ndim != 2 or not codes.is_contiguous():
        raise ValueError(f"packed must be contiguous uint8 [out, 3 * in / 8], got {codes.dtype} {tuple(codes.shape)}")
    blocks, rest = divmod(codes.shape[1], BLOCK_BYTES)
    if rest or blocks == 0:
        raise ValueError(
            f"{BLOCK_SIZE} inputs take {BLOCK_BYTES} bytes; packed {tuple(codes.shape)} has a part of them"
        )
    if not x.is_floating_point() or x.shape[-1:] != (blocks * BLOCK_SIZE,):
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; a packed weight {tuple(codes.shape)} takes [..., {blocks * BLOCK_SIZE}]"
        )
    check_groups(len(codes), blocks * BLOCK_SIZE, scales, None, GROUP_SIZES)
    check_tensors(x, (torch.uint8,), packed=codes)
    check_tensors(x, FLOATING, x=x, scales=scales)


INT3 = PackedProduct("linear_int3", linear_int3_reference, check_int3, w3a16_triton)
INT3.implementation("triton", groups=any_rows)(w3a16_triton)
INT3.implementation("native", grouped_misfit, few_rows)(NativeProduct("int3", grouped=True))
INT3.implementation("torch")(by_tiles(unpacked))


def linear_int3(x: Tensor, weight: Packed, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual with int3 weights in groups, W[n, k] = scales[n, g] * (code[n, k] - 8), codes 0, 2 .. 14.

    x: [..., in] floating; weight: codes [out, 3 * in / 8] uint8, scales [out, in / group] floating, group 32, 64 or
    128; bias: [out]; residual: [..., out] in the dtype of x. Returns [..., out] like x. Raises ValueError for shapes or
    dtypes that do not fit.
    """
    return INT3.linear(x, weight, bias, residual)


def linear_int3_swiglu(x: Tensor, gate: Packed, up: Packed) -> Tensor:
    """silu(x G^T) * (x U^T), x read once; gate and up are packed weights of one shape and group as in `linear_int3`.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    return INT3.swiglu(x, gate, up)
