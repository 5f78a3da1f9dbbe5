"""Linear layers with int4 weights in groups (W4A16), alone or as a SwiGLU pair.

    y[m, n] = sum_k x[m, k] * scales[n, g] * (code[n, k] - zeros[n, g]) + bias[n] + residual[m, n],    g = k // group
    SwiGLU: y = silu(gate(x)) * up(x), two such products of one x

x: [rows, in] float16, bfloat16 or float32; codes: [out, in / 2] uint8, the even input in a byte's low four bits;
scales, zeros: [out, in / group], zeros absent where all are 8. Groups of 32, 64 or 128 inputs. Sums and epilogues are
float32 and are rounded to the dtype of x once.

Bound by memory up to about 100 rows: a launch must read out * in * (1/2 + 2 / group) bytes of codes and 16-bit scales,
and reads them once for every BLOCK_M rows, that is once up to 64 rows; every block of outputs reads x from L2.
2 * rows * out * in FLOPs, after about 3 instructions per weight to dequantize it: the code is or-ed into the mantissa
of a power of two, from which 2^23 + zero is subtracted; the high code of a byte is 4 bits higher, in 2^19. Few rows:
the differences, exact in 16 bits up to their zero, go to the tensor cores and the scale multiplies a group's sum. Many
rows: there are more sums than weights, so the scale multiplies the weights before they are rounded.
Up to 16 rows, these instructions would be the bottleneck. 16-bit x and weights without zeros have a separate kernel for
few rows, which loads 16 bytes at a time and unpacks 8 weights by 7 instructions (float16: 8), two at a time, to base +
code in registers of the tensor core. Their order is that of the shifts, and x is put into the same order. The tensor
cores also sum (base + 8) x, once for many outputs; subtracting it costs 5 of the 24 bits of float32, or 3 in float16.
Weights are the product's left operand, tokens its columns; split inner dimensions as in `packed_product`.

torch on a CPU: if `prepare_int4` has made a copy of the codes with 16 to 64 channels interleaved, few rows go to
torch's own kernel, which needs this layout; the copy lives as long as the weight. Everything else goes to a dense
product with weights unpacked a tile at a time. The even inputs of a tile are before the odd ones, which saves
interleaving them; x is reordered in the same way.

Native, on a CPU: up to 16 rows read the weights once from memory. bfloat16 activations (from AVX2 on) use integer
arithmetic: the activations of a group become 15-bit integers with one scale. More rows: as in `linear_int8`.

Source: Frantar et al. 2022, arXiv:2210.17323 (groups); Kim et al. 2022, arXiv:2211.10017 (codes in the mantissa).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .arguments import FLOATING, check_tensors
from .configs import Config, Configs, family
from .dispatch import on_cpu
from .few_rows import few_rows
from .packed_product import (
    AddNorm,
    NativeProduct,
    PackedProduct,
    add_epilogue,
    block_of,
    check_groups,
    config_for,
    grouped_misfit,
    launch_product,
    product_by_tiles,
    rows_to_plan_for,
    store_product,
    tile_config,
    two_products,
    within_group,
)
from .packed_weight import Packed
from .row_groups import any_rows
from .strides import as_rows
from .triton_language import tl, triton

GROUP_SIZES = (32, 64, 128)
SYMMETRIC_ZERO = 8
# torch on a CPU: up to here its int4 kernel is faster than unpacking for a dense product (docs/quantization.md).
MOST_ROWS_INTERLEAVED = 64
_PACKED_AT_ONCE = 1024  # channels, a multiple of the interleaved ones; packing takes eight times their memory


def unpack_int4(packed: Tensor) -> Tensor:
    """The codes of packed weights, [out, in] uint8 of 0 .. 15."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def unpacked(weight: Packed) -> Tensor:
    """The weights [out, in], in float32, or float64 if the scales are."""
    packed, scales, zeros = weight
    dtype = torch.promote_types(scales.dtype, torch.float32)
    codes = unpack_int4(packed).to(dtype).unflatten(1, (scales.shape[1], -1))
    zero = SYMMETRIC_ZERO if zeros is None else zeros.to(dtype)[..., None]
    return ((codes - zero) * scales.to(dtype)[..., None]).flatten(1)


def linear_int4_reference(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The specification of `linear_int4`, in float64."""
    return add_epilogue(x.double() @ unpacked(weight.wide()).T, bias, residual).to(x.dtype)


@triton.jit
def _codes(packed):  # type: ignore[no-untyped-def]
    """code - 8 of the low and of the high code of the lowest byte of int32 numbers, as float32.

    A code becomes the lowest bits of the mantissa of a power of two, which is then subtracted together with 8.
    """
    low = ((packed & 0x0F) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0  # 2^23 + 8
    high = ((packed & 0xF0) | 0x49000000).to(tl.float32, bitcast=True) - 524296.0  # 2^19 + 8
    return low, high


@triton.jit
def _add_group(acc, tokens, codes, scales, zeros, levels, at, group, SCALE_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + the product of a tile of weights with tokens. The tile's codes begin at codes + at, all in one group."""
    packed = tl.load(codes + at).to(tl.int32)
    if levels is not None:
        # Rows of levels, as gather needs; a compiled kernel holds one level per lane and shuffles.
        table = tl.broadcast_to(tl.load(levels + tl.arange(0, 16))[None, :], (packed.shape[0], 16))
        even = tl.gather(table, packed >> 4, 1)
        odd = tl.gather(table, packed & 0x0F, 1)
    else:
        even, odd = _codes(packed)
    if zeros is not None:
        shift = tl.load(zeros + group).to(tl.float32)[:, None] - 8.0
        even -= shift
        odd -= shift
    scale = tl.load(scales + group).to(tl.float32)[:, None]
    if SCALE_WEIGHTS:
        even *= scale
        odd *= scale
        weights = tl.interleave(even.to(DTYPE), odd.to(DTYPE))
        acc = tl.dot(weights, tokens, acc, input_precision="ieee")
    else:
        weights = tl.interleave(even.to(DTYPE), odd.to(DTYPE))
        acc += tl.dot(weights, tokens, input_precision="ieee") * scale
    return acc


# What follows is for words of eight codes. One instruction, (word & codes) | base, makes two numbers of a word: the
# codes in the lowest four bits of both halves become the mantissas of 2^7 + code in bfloat16. In float16, whose sums
# need more digits, the codes are 6 bits higher and become 2^4 + code.
BFLOAT16_NUMBERS = tl.constexpr("lop3.b32 $0, $1, 0x000F000F, 0x43004300, 0xEA;")
FLOAT16_NUMBERS = tl.constexpr("lop3.b32 $0, $1, 0x03C003C0, 0x4C004C00, 0xEA;")


@triton.jit
def _numbers(words, CODE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """2^7 + code or, in float16, 2^4 + code for the codes CODE and CODE + 4 of int32 words, as two halves of an int32.

    PTX: use an instruction of NVIDIA's, for which the compiler would need two.
    """
    LEFT: tl.constexpr = (0 if tl.bfloat16 == DTYPE else 6) - 4 * CODE
    if LEFT > 0:
        words = words << LEFT
    elif LEFT < 0:
        words = words >> -LEFT
    if PTX:
        source: tl.constexpr = BFLOAT16_NUMBERS if tl.bfloat16 == DTYPE else FLOAT16_NUMBERS
        return tl.inline_asm_elementwise(source, "=r,r", [words], tl.int32, is_pure=True, pack=1)
    elif tl.bfloat16 == DTYPE:
        return (words & 0x000F000F) | 0x43004300
    else:
        return (words & 0x03C003C0) | 0x4C004C00


@triton.jit
def _weights(words, CODE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Half of the numbers of words [BLOCK_N, words]: [BLOCK_N, 4 * words], those of the codes CODE, CODE + 4, CODE + 1
    and CODE + 5 of each word."""
    pairs = tl.join(_numbers(words, CODE, DTYPE, PTX), _numbers(words, CODE + 1, DTYPE, PTX))
    pairs = tl.reshape(pairs, (words.shape[0], 2 * words.shape[1]))
    low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def halves_of(tokens):  # type: ignore[no-untyped-def]
    """Tokens [inputs, BLOCK_M] in the order of the numbers: the inputs 0, 4, 1, 5 and 2, 6, 3, 7 of every eight."""
    HALF: tl.constexpr = tokens.shape[0] // 2
    eights = tl.reshape(tokens, (tokens.shape[0] // 8, 2, 2, 2, tokens.shape[1]))
    first, second = tl.split(tl.trans(eights, 0, 3, 1, 4, 2))
    return tl.reshape(first, (HALF, tokens.shape[1])), tl.reshape(second, (HALF, tokens.shape[1]))


@triton.jit
def shift_of(first, second, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_N, BLOCK_M]: the sums of the tokens, times what makes code - 8 of a number when it is added.

    One tile of the tensor core per warp computes them for all outputs of the warp.
    """
    ROWS: tl.constexpr = 16 * WARPS
    BLOCK_M: tl.constexpr = first.shape[1]
    shift = tl.full((ROWS, first.shape[0] // 2), -136.0 if tl.bfloat16 == first.dtype else -24.0, first.dtype)
    # Joined like the weights, so that the compiler gives these products the same layout of tokens.
    shift = tl.reshape(tl.join(shift, shift), (ROWS, first.shape[0]))
    sums = tl.dot(shift, second, tl.dot(shift, first))
    return tl.reshape(tl.broadcast_to(sums[None], (BLOCK_N // ROWS, ROWS, BLOCK_M)), (BLOCK_N, BLOCK_M))


@triton.jit
def dot_words(words, first, second, acc, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + the product of the numbers of words [BLOCK_N, inputs / 8] with tokens in `halves_of`."""
    acc = tl.dot(_weights(words, 0, first.dtype, PTX), first, acc)
    return tl.dot(_weights(words, 2, first.dtype, PTX), second, acc)


@triton.jit(do_not_specialize=["rows", "steps"])
def _w4a16_words_kernel(  # type: ignore[no-untyped-def]
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
    PTX: tl.constexpr,
    WARPS: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For a few rows of 16-bit x and weights without zeros. PTX: whether the chip has NVIDIA's instructions."""
    PART: tl.constexpr = min(GROUP, 1024 // BLOCK_M)  # inputs at a time, within a group; more would spill registers
    m, n = block_of(rows, columns, BLOCK_M, BLOCK_N)
    channel = tl.minimum(n, columns - 1).to(tl.int64)
    xs = x + m[None, :].to(tl.int64) * inner + tl.arange(0, PART)[:, None]
    # Rows, like groups, are a multiple of 16 bytes long. Written in this form, the index gives loads of 16 bytes.
    at = channel[:, None] * (inner // 32 * 4) + tl.arange(0, PART // 8)[None, :]
    groups = channel * (inner // GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = tl.program_id(1) * steps * BLOCK_K
    for k in range(start, tl.minimum(start + steps * BLOCK_K, inner), BLOCK_K):
        for part in tl.static_range(BLOCK_K // PART):
            here = k + part * PART
            group = groups + here // GROUP
            first, second = halves_of(tl.load(xs + here, mask=m[None, :] < rows, other=0))
            shift = shift_of(first, second, BLOCK_N, WARPS)
            sums = dot_words(tl.load(words + at + here // 8), first, second, shift, PTX)
            acc += sums * tl.load(scales + group).to(tl.float32)[:, None]
            if up_words is not None:
                sums = dot_words(tl.load(up_words + at + here // 8), first, second, shift, PTX)
                up_acc += sums * tl.load(up_scales + group).to(tl.float32)[:, None]
    store_product(acc, up_words, up_acc, out, partials, counters, bias, residual, norm, m, n, rows, columns, ROW)


@triton.jit(do_not_specialize=["rows", "steps"])
def _w4a16_kernel(  # type: ignore[no-untyped-def]
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
    levels,
    GROUP: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """levels: nf4's codebook, [16] float32, whose even input is in a byte's high bits; or null for int4."""
    SCALE_WEIGHTS: tl.constexpr = BLOCK_M > 64
    DTYPE: tl.constexpr = x.dtype.element_ty
    m, n = block_of(rows, columns, BLOCK_M, BLOCK_N)
    channel = tl.minimum(n, columns - 1).to(tl.int64)
    xs = x + m[None, :].to(tl.int64) * inner + tl.arange(0, BLOCK_K)[:, None]
    at = channel[:, None] * (inner // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    groups = channel * (inner // GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = tl.program_id(1) * steps * BLOCK_K
    for k in range(start, tl.minimum(start + steps * BLOCK_K, inner), BLOCK_K):
        tokens = tl.load(xs + k, mask=m[None, :] < rows, other=0)
        here, group = at + k // 2, groups + k // GROUP
        acc = _add_group(acc, tokens, codes, scales, zeros, levels, here, group, SCALE_WEIGHTS, DTYPE)
        if up is not None:
            up_acc = _add_group(up_acc, tokens, up, up_scales, up_zeros, levels, here, group, SCALE_WEIGHTS, DTYPE)
    store_product(acc, up, up_acc, out, partials, counters, bias, residual, norm, m, n, rows, columns, ROW)


# Keys: the largest number of rows of a config; the last config also serves more. BLOCK_K is at most the group.
_W4A16 = {
    16: Configs(
        "linear_int4_16",
        tile_config(16, 64, 128, 4, 4),
        dict.fromkeys(("sm80", "sm90"), tile_config(16, 128, 128, 4, 3)),  # fewer instructions a weight
    ),
    32: Configs("linear_int4_32", tile_config(32, 64, 128, 4, 4)),
    64: Configs("linear_int4_64", tile_config(64, 64, 128, 4, 3)),
    128: Configs("linear_int4_128", tile_config(128, 128, 64, 8, 3)),
}
# A pair has two sums per output, so registers hold half as many outputs.
_W4A16_PAIR = {
    **_W4A16,
    32: Configs("linear_int4_pair_32", tile_config(32, 64, 128, 4, 4), {"sm100": tile_config(32, 64, 128, 8, 4)}),
    128: Configs(
        "linear_int4_pair_128",
        tile_config(128, 64, 64, 8, 3),
        dict.fromkeys(("sm90", "sm100"), tile_config(128, 128, 64, 8, 3)),
    ),
}
# Of words. Each warp multiplies 64 outputs, or 32 of both weights, with the tokens in its registers. With 8 tokens or 2
# warps, sm_90 and sm_100 use the instruction of one warp, HMMA, whose weights are in registers. BLOCK_K may be several
# groups.
_AMD = {"gfx942": tile_config(16, 128, 128, 4, 2)}
_AMD_PAIR = {"gfx942": tile_config(16, 64, 128, 4, 2)}
_WORDS = {
    8: Configs("linear_int4_words_8", tile_config(8, 256, 128, 4, 3), _AMD),
    16: Configs("linear_int4_words_16", tile_config(16, 128, 128, 2, 3), _AMD),
}
_WORDS_PAIR = {
    8: Configs("linear_int4_words_pair_8", tile_config(8, 128, 128, 4, 3), _AMD_PAIR),
    16: Configs("linear_int4_words_pair_16", tile_config(16, 64, 128, 2, 3), _AMD_PAIR),
}


def config_of(rows: int, group: int, pair: bool, device: torch.device) -> Config:
    """The launch config of a product of `rows` tokens with weights in groups of `group`, or with a pair of weights."""
    config = config_for(_W4A16_PAIR if pair else _W4A16, rows, device)
    return within_group(config, group)


def _config_of_words(rows: int, inner: int, pair: bool, device: torch.device) -> Config:
    """The config of a product by words: whole steps of one group or more."""
    config = config_for(_WORDS_PAIR if pair else _WORDS, rows, device)
    return within_group(config, math.gcd(inner, config.blocks["BLOCK_K"]))


def w4a16_triton(
    x: Tensor,
    weight: Packed,
    up: Packed | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: AddNorm | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """The product on a GPU. norm: see `linear_norm`; levels: see `linear_nf4`."""
    group = x.shape[-1] // weight.scales.shape[1]
    options: dict[str, Any] = {"owner": weight.codes, "norm": norm, "GROUP": group}
    rows, pair = x.shape[:-1].numel(), up is not None
    if rows_to_plan_for(rows) <= max(_WORDS) and x.element_size() == 2 and weight.zeros is None and levels is None:
        config = _config_of_words(rows, x.shape[-1], pair, x.device)
        options["PTX"] = x.device.type != "cpu" and family(x.device).startswith("sm")
        options["WARPS"] = config.num_warps
        parts = in_words(weight), up and in_words(up)
        return launch_product(_w4a16_words_kernel, x, *parts, bias, residual, config, **options)
    config = config_of(rows, group, pair, x.device)
    return launch_product(_w4a16_kernel, x, weight, up, bias, residual, config, levels=levels, **options)


def in_words(weight: Packed) -> tuple[Tensor, Tensor]:
    """The bytes as int32 words, [out, bytes / 4], a copy if they do not begin at a word boundary, and the scales."""
    codes = weight.codes
    return (codes.clone() if codes.storage_offset() % 4 else codes).view(torch.int32), weight.scales


def check_int4(x: Tensor, weight: Packed) -> None:
    """Raise ValueError unless x [..., in] and a weight packed in groups fit."""
    codes, scales, zeros = weight
    if codes.dtype != torch.uint8 or codes.ndim != 2 or not codes.is_contiguous():
        raise ValueError(f"packed must be contiguous uint8 [out, in / 2], got {codes.dtype} {tuple(codes.shape)}")
    inner = 2 * codes.shape[1]
    if not x.is_floating_point() or x.shape[-1:] != (inner,):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; a packed weight {tuple(codes.shape)} takes [..., {inner}]")
    check_groups(len(codes), inner, scales, zeros, GROUP_SIZES)
    check_tensors(x, (torch.uint8,), packed=codes)
    check_tensors(x, FLOATING, x=x, scales=scales, zeros=zeros)


INT4 = PackedProduct("linear_int4", linear_int4_reference, check_int4, w4a16_triton, zeros=True)
INT4.implementation("triton", groups=any_rows)(w4a16_triton)
int4_native = INT4.implementation("native", grouped_misfit, few_rows)(NativeProduct("int4", grouped=True))


@INT4.implementation("torch")
@two_products
def int4_torch(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The product by torch's operations."""
    rows, columns = as_rows(x), len(weight.codes)
    copy = _copies.get(weight.codes) if rows.shape[0] <= MOST_ROWS_INTERLEAVED else None
    if copy is not None and copy[1].dtype == x.dtype:
        group = x.shape[-1] // weight.scales.shape[1]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, copy[0], group, copy[1])
    else:
        halves = rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
        y = product_by_tiles(halves, columns, lambda tile: _unpacked_halves(weight.rows(tile), x.dtype))
    return add_epilogue(y.view(*x.shape[:-1], columns), bias, residual)


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _interleaved(weight: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes in the layout of torch's CPU kernel, and [in / group, out, 2] scales and values of code 8."""
    packed, scales, zeros = weight
    blocks = torch.empty_like(packed)
    for codes, part in zip(packed.split(_PACKED_AT_ONCE), blocks.split(_PACKED_AT_ONCE), strict=True):
        part.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_int4(codes).int(), 1))
    wide = scales.float()
    middle = torch.zeros_like(wide) if zeros is None else (SYMMETRIC_ZERO - zeros.float()) * wide
    return blocks, torch.stack((wide, middle), -1).transpose(0, 1).contiguous().to(dtype)


def _unpacked_halves(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The weights in `dtype`, [channels, in], all even inputs before all odd ones."""
    codes, scales, zeros = weight
    if codes.storage_offset() % 8:
        codes = codes.clone()
    words = codes.view(torch.int64)  # eight bytes at once: torch has no vectorized shift of bytes
    halves = torch.empty(len(codes), 2, codes.shape[1], dtype=dtype, device=codes.device)
    for half, shift in enumerate((0, 4)):
        halves[:, half] = (words >> shift).bitwise_and_(0x0F0F0F0F0F0F0F0F).view(torch.uint8)
    grouped = halves.view(len(codes), 2, scales.shape[1], -1)
    grouped -= SYMMETRIC_ZERO if zeros is None else zeros.to(dtype)[:, None, :, None]
    grouped *= scales.to(dtype)[:, None, :, None]
    return halves.flatten(1)


def prepare_int4(weight: Packed, dtype: torch.dtype) -> None:
    """Prepare a weight for products with x in `dtype`, as the selected implementation needs.

    Makes a copy as large as the codes if torch multiplies on a CPU, and nothing otherwise.
    """
    codes = weight.codes
    if INT4.single.candidates(codes.device)[0] == "torch" and on_cpu(codes) and len(codes) % 16 == 0:
        _copies[codes] = _interleaved(weight, dtype)


def linear_int4(x: Tensor, weight: Packed, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual with int4 weights in groups, W[n, k] = scales[n, g] * (code[n, k] - zeros[n, g]).

    x: [..., in] floating; weight: codes [out, in / 2] uint8, scales [out, in / group] floating, group 32, 64 or 128,
    zeros like scales, or None for 8; bias: [out]; residual: [..., out] in the dtype of x. Returns [..., out] like x.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    return INT4.linear(x, weight, bias, residual)


def linear_int4_swiglu(x: Tensor, gate: Packed, up: Packed) -> Tensor:
    """silu(x G^T) * (x U^T), x read once; gate and up are packed weights of one shape and group as in `linear_int4`.

    Both have zeros or neither. Raises ValueError otherwise.
    """
    return INT4.swiglu(x, gate, up)
