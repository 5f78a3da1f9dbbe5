"""Linear layers with weights in the 4-bit float e2m1 in small blocks (W4A16), alone or as a SwiGLU pair.

    nvfp4    W[n, k] = channels[n] * scales[n, k // 16] * e2m1(code[n, k]),    scales in e4m3
    mxfp4    W[n, k] = 2^(scales[n, k // 32] - 127) * e2m1(code[n, k])
             y[m, n] = sum_k x[m, k] * W[n, k] + bias[n] + residual[m, n]
    SwiGLU   y = silu(gate(x)) * up(x), two such products of one x

x: [rows, in] float16, bfloat16 or float32; codes: [out, in / 2] uint8, the even input in a byte's low four bits;
scales: [out, in / 16] float8_e4m3fn and channels: [out] float32, or scales: [out, in / 32] uint8 (e8m0) and no
channels. A code is a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4 or 6. Sums and epilogues
are float32 and are rounded to the dtype of x once.

Triton: 2 * rows * out * in FLOPs. Up to about 100 rows a launch is bound by reading out * in * (1/2 + 1/16) bytes of
nvfp4, or (1/2 + 1/32) of mxfp4, once for every BLOCK_M rows. Weights become the dtype of x in registers: the three bits
beside the sign are placed at the border of exponent and mantissa, where they are the float's own, too small by a power
of two; for 16-bit x this takes six instructions for two weights. The product with the block's scale has at most six
significant bits, so it is exact in bfloat16, and in float16 within its range; channels multiply the sums.
Weights are the product's left operand, tokens its columns; split inner dimensions as in `packed_product`.

On a CPU, and for a torch backend anywhere, weights are made dense a tile of channels at a time, by a table of the 256
bytes: that writes and reads out * in * 2 bytes more, so int4 is faster there.

Source: Rouhani et al. 2023, arXiv:2310.10537 (e2m1 and e8m0); NVIDIA, "Introducing NVFP4 for Efficient and Accurate
Low-Precision Inference" (blocks of 16 with scales in e4m3).
"""

from functools import cache
from math import gcd

import torch
from torch import Tensor

from .arguments import FLOATING, check_tensors
from .configs import Configs, family
from .linear_int4 import in_words
from .packed_product import (
    AddNorm,
    PackedProduct,
    add_epilogue,
    block_of,
    by_tiles,
    config_for,
    launch_product,
    store_product,
    tile_config,
    within_group,
)
from .packed_weight import Packed
from .quantize_rows import E4M3
from .row_groups import any_rows
from .triton_language import tl, triton

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NVFP4_BLOCK, MXFP4_BLOCK = 16, 32
INPUTS = 32  # inputs come in multiples of this: rows of codes are multiples of 16 bytes
E8M0 = torch.uint8  # the exponents are stored as they are


@cache
def _byte_values(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 2]: the two values of each byte of codes."""
    levels = torch.tensor((*LEVELS, *(-level for level in LEVELS)), dtype=dtype, device=device)
    return torch.stack((levels.repeat(16), levels.repeat_interleave(16)), -1)


def block_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of blocks' scales in e4m3 or e8m0, in float32 or float64. The e8m0 number 255 is NaN."""
    if scales.dtype != E8M0:
        return scales.to(dtype)
    powers = torch.exp2(scales.to(torch.float64) - 127).to(dtype)
    return powers.masked_fill(scales == 255, torch.nan)


def unpacked(weight: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [out, in], in float32 or float64."""
    codes, scales, channels = weight
    pairs = _byte_values(codes.device, dtype).index_select(0, codes.flatten().int())
    blocks = pairs.view(len(codes), scales.shape[1], -1) * block_scales(scales, dtype)[..., None]
    return (blocks if channels is None else blocks * channels.to(dtype)[:, None, None]).flatten(1)


def linear_nvfp4_reference(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The specification of `linear_nvfp4`, in float64."""
    return add_epilogue(x.double() @ unpacked(weight, torch.float64).T, bias, residual).to(x.dtype)


# The codes of byte b of a word, those of the inputs 2 b and 2 b + 1, become the two 16-bit numbers of a register: prmt
# copies the byte to the low half, and the byte of the word shifted by 4 to the high half, twice each. The three bits
# beside the sign move to the border of exponent and mantissa, the sign to the top, and the fma multiplies by the power
# of two, 2^126 (bfloat16) or 2^14 (float16), that makes subnormal 0.5 what it should be.
_PAIR = """prmt.b32 pair, $4, high, {bytes};
shl.b32 sign, pair, 4;
shl.b32 pair, pair, {shift};
and.b32 pair, pair, {magnitude};
lop3.b32 pair, pair, sign, 0x80008000, 0xF8;
fma.rn.{type} ${result}, pair, power, zero;
"""


def _pairs(**constants: str | int) -> str:
    bytes_of = ("0x4400", "0x5511", "0x6622", "0x7733")
    pairs = "".join(_PAIR.format(result=i, bytes=order, **constants) for i, order in enumerate(bytes_of))
    power = constants["power"]
    head = f".reg .b32 high, pair, sign, power, zero;\nmov.b32 power, {power};\nmov.b32 zero, 0x80008000;\n"
    return "{\n" + head + "shr.u32 high, $4, 4;\n" + pairs + "}"


BFLOAT16_PAIRS = tl.constexpr(_pairs(type="bf16x2", shift=6, magnitude="0x01C001C0", power="0x7E807E80"))
FLOAT16_PAIRS = tl.constexpr(_pairs(type="f16x2", shift=9, magnitude="0x0E000E00", power="0x74007400"))


@triton.jit
def _value(code):  # type: ignore[no-untyped-def]
    """The float32 value of int32 codes' lowest four bits."""
    magnitude = code & 7
    small = magnitude.to(tl.float32) * 0.5
    large = ((magnitude << 22) + 0x3F000000).to(tl.float32, bitcast=True)  # exponents begin at 2^-1
    value = tl.where(magnitude < 2, small, large)
    return tl.where((code & 8) == 0, value, -value)


@triton.jit
def _pair(words, byte: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The result of `_PAIR` for one byte, by operations that every device and the interpreter have."""
    low = _value(words >> 8 * byte).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (_value(words >> 8 * byte + 4).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _codes(words, DTYPE: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values of words [BLOCK_N, BLOCK_K / 8] with eight codes each: [BLOCK_N, BLOCK_K] in a 16-bit DTYPE."""
    if PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            BFLOAT16_PAIRS if tl.bfloat16 == DTYPE else FLOAT16_PAIRS,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        a, b = _pair(words, 0, DTYPE), _pair(words, 1, DTYPE)
        c, d = _pair(words, 2, DTYPE), _pair(words, 3, DTYPE)
    pairs = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (words.shape[0], 4 * words.shape[1]))
    even = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    odd = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(even, odd), (words.shape[0], 8 * words.shape[1]))


@triton.jit
def _wide_codes(words):  # type: ignore[no-untyped-def]
    """The values of words as in `_codes`, in float32."""
    a = tl.join(tl.join(_value(words), _value(words >> 16)), tl.join(_value(words >> 8), _value(words >> 24)))
    b = tl.join(tl.join(_value(words >> 4), _value(words >> 20)), tl.join(_value(words >> 12), _value(words >> 28)))
    return tl.reshape(tl.join(a, b), (words.shape[0], 8 * words.shape[1]))


@triton.jit
def _scale(stored, E4M3: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 values of uint8 scales, which are not NaN."""
    bits = stored.to(tl.int32)
    if not E4M3:
        return tl.maximum(bits << 23, 0x00400000).to(tl.float32, bitcast=True)  # the least is 2^-127
    magnitude = bits & 0x7F
    small = magnitude.to(tl.float32) * 0.001953125  # below 2^-6 in steps of 2^-9
    large = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, small, large)
    return tl.where(bits < 128, value, -value)


@triton.jit
def _add(acc, tokens, words, scales, DTYPE: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + the product of a tile of weights, at the pointers words and scales, with tokens [BLOCK_K, BLOCK_M]."""
    E4M3: tl.constexpr = BLOCK == 16
    WIDE: tl.constexpr = tl.float32 == DTYPE or (tl.float16 == DTYPE and not E4M3)  # float16 lacks most of e8m0
    scale = _scale(tl.load(scales), E4M3)[:, :, None]
    packed = tl.load(words)
    if WIDE:
        codes = _wide_codes(packed)
    else:
        codes = _codes(packed, DTYPE, PTX)
        scale = scale.to(DTYPE)
    shape: tl.constexpr = (scale.shape[0], scale.shape[1], BLOCK)
    weights = tl.reshape(tl.reshape(codes, shape) * scale, codes.shape).to(DTYPE)
    return tl.dot(weights, tokens, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "steps"])
def _nvfp4_kernel(  # type: ignore[no-untyped-def]
    x,
    words,
    scales,
    channels,
    up_words,
    up_scales,
    up_channels,
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
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """words: int32, of eight codes; scales: uint8, each of BLOCK inputs. PTX: whether the chip has NVIDIA's
    instructions."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    m, n = block_of(rows, columns, BLOCK_M, BLOCK_N)
    channel = tl.minimum(n, columns - 1).to(tl.int64)
    xs = x + m[None, :].to(tl.int64) * inner + tl.arange(0, BLOCK_K)[:, None]
    # Rows are a multiple of 16 bytes long. Written in this form, the index gives loads of 16 bytes.
    at = channel[:, None] * (inner // 32 * 4) + tl.arange(0, BLOCK_K // 8)[None, :]
    blocks = channel[:, None] * (inner // 32 * (32 // BLOCK)) + tl.arange(0, BLOCK_K // BLOCK)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = tl.program_id(1) * steps * BLOCK_K
    for k in range(start, tl.minimum(start + steps * BLOCK_K, inner), BLOCK_K):
        tokens = tl.load(xs + k, mask=m[None, :] < rows, other=0)
        here, block = at + k // 8, blocks + k // BLOCK
        acc = _add(acc, tokens, words + here, scales + block, DTYPE, BLOCK, PTX)
        if up_words is not None:
            up_acc = _add(up_acc, tokens, up_words + here, up_scales + block, DTYPE, BLOCK, PTX)
    if channels is not None:
        acc *= tl.load(channels + channel).to(tl.float32)[:, None]
        if up_words is not None:
            up_acc *= tl.load(up_channels + channel).to(tl.float32)[:, None]
    store_product(acc, up_words, up_acc, out, partials, counters, bias, residual, norm, m, n, rows, columns, ROW)


# Keys: the largest number of rows of a config; the last config also serves more.
_CONFIGS = {
    16: Configs("linear_nvfp4_16", tile_config(16, 64, 128, 4, 4)),
    32: Configs("linear_nvfp4_32", tile_config(32, 64, 128, 4, 4)),
    64: Configs("linear_nvfp4_64", tile_config(64, 64, 128, 4, 3)),
    128: Configs("linear_nvfp4_128", tile_config(128, 128, 64, 8, 3)),
}
# A pair has two sums per output, so registers hold half as many outputs.
_PAIR_CONFIGS = {
    **_CONFIGS,
    128: Configs(
        "linear_nvfp4_pair_128",
        tile_config(128, 64, 64, 8, 3),
        {"sm100": tile_config(128, 128, 64, 8, 3)},
    ),
}


def nvfp4_triton(
    x: Tensor,
    weight: Packed,
    up: Packed | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: AddNorm | None = None,
) -> Tensor:
    """The product on a GPU. norm: see `linear_norm`."""
    config = config_for(_CONFIGS if up is None else _PAIR_CONFIGS, x.shape[:-1].numel(), x.device)
    config = within_group(config, gcd(x.shape[-1], 128))
    block, owner = x.shape[-1] // weight.scales.shape[1], weight.codes
    ptx = x.device.type != "cpu" and family(x.device).startswith("sm")
    parts = _as_read(weight), up and _as_read(up)
    return launch_product(
        _nvfp4_kernel, x, *parts, bias, residual, config, owner=owner, norm=norm, BLOCK=block, PTX=ptx
    )


def _as_read(weight: Packed) -> tuple[Tensor | None, ...]:
    """The tensors of a weight in the dtypes that the kernel reads; not every chip has a type e4m3."""
    words, scales = in_words(weight)
    return words, scales.view(torch.uint8), weight.zeros


def check_nvfp4(x: Tensor, weight: Packed) -> None:
    """Raise ValueError unless x [..., in] and the weight are valid for `linear_nvfp4`."""
    codes, scales, channels = weight
    if codes.dtype != torch.uint8 or codes.ndim != 2 or not codes.is_contiguous():
        raise ValueError(f"codes must be contiguous uint8 [out, in / 2], got {codes.dtype} {tuple(codes.shape)}")
    columns, inner = len(codes), 2 * codes.shape[1]
    if not x.is_floating_point() or x.shape[-1:] != (inner,) or inner % INPUTS or inner == 0:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; codes {tuple(codes.shape)} take [..., {inner}], a multiple of {INPUTS}"
        )
    block = NVFP4_BLOCK if scales.dtype == E4M3 else MXFP4_BLOCK
    if scales.dtype not in (E4M3, E8M0) or scales.shape != (columns, inner // block) or not scales.is_contiguous():
        raise ValueError(
            f"scales must be contiguous {E4M3} {(columns, inner // NVFP4_BLOCK)} or {E8M0} "
            f"{(columns, inner // MXFP4_BLOCK)}, got {scales.dtype} {tuple(scales.shape)}"
        )
    if (channels is None) != (block == MXFP4_BLOCK):
        raise ValueError("nvfp4 has a scale for each channel in the place of zeros, and mxfp4 has none")
    if channels is not None and (
        channels.shape != (columns,) or not channels.is_floating_point() or not channels.is_contiguous()
    ):
        raise ValueError(
            f"zeros, the scales of channels, must be contiguous floating {(columns,)}, got {channels.dtype} "
            f"{tuple(channels.shape)}"
        )
    check_tensors(x, (torch.uint8,), codes=codes)
    check_tensors(x, (E4M3, E8M0), scales=scales)
    check_tensors(x, FLOATING, x=x, zeros=channels)


NVFP4 = PackedProduct("linear_nvfp4", linear_nvfp4_reference, check_nvfp4, nvfp4_triton, zeros=True)
NVFP4.implementation("triton", groups=any_rows)(nvfp4_triton)
NVFP4.implementation("torch")(by_tiles(unpacked))


def linear_nvfp4(x: Tensor, weight: Packed, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual with weights in e2m1, nvfp4 if the scales are e4m3 and mxfp4 if they are e8m0.

    x: [..., in] floating, in a multiple of 32; weight: codes [out, in / 2] uint8, scales [out, in / 16] float8_e4m3fn,
    and the channels' scales [out] floating in the place of zeros; or scales [out, in / 32] uint8 and no zeros. Scales
    must not be NaN. bias: [out]; residual: [..., out] in the dtype of x. Returns [..., out] in the dtype of x. Raises
    ValueError when shapes or dtypes do not fit.
    """
    return NVFP4.linear(x, weight, bias, residual)


def linear_nvfp4_swiglu(x: Tensor, gate: Packed, up: Packed) -> Tensor:
    """silu(x G^T) * (x U^T), x read once; gate and up are weights of one shape and format as in `linear_nvfp4`.

    Raises ValueError when shapes or dtypes do not fit.
    """
    return NVFP4.swiglu(x, gate, up)
