"""ggml's block formats in GGUF files: decodes them, and packs them for the runtime's products without rounding again.

A weight is scale * code - minimum, with a scale and a minimum for each group of neighbouring inputs of a channel:

    format  inputs  bytes  layout of a block                                         group  scale   minimum
    Q4_0        32     18  f16 d, 16 bytes of codes                                     32  d       0, codes less 8
    Q4_1        32     20  f16 d, f16 m, 16 bytes of codes                              32  d       -m
    Q5_0        32     22  f16 d, 4 bytes of fifth bits, 16 bytes of codes              32  d       0, codes less 16
    Q5_1        32     24  f16 d, f16 m, 4 bytes of fifth bits, 16 bytes of codes       32  d       -m
    Q8_0        32     34  f16 d, 32 int8 codes                                         32  d       0
    Q4_K       256    144  f16 d, f16 e, 12 bytes of s and m, 128 bytes of codes        32  d s     e m
    Q5_K       256    176  as Q4_K, with 32 bytes of fifth bits before the codes        32  d s     e m
    Q6_K       256    210  128 bytes of codes, 64 of upper bits, 16 int8 s, f16 d       16  d s     0, codes less 32

In a byte of codes the low four bits come first: the first half of a block of 32 inputs (for Q4_K and Q5_K, of a run of
64) is in the low bits, the second half in the high ones. s and m of the K formats are six bits wide.

Packed weights have unchanged codes, the scales d as float16 or d s as float32, in which the product is exact, and for
formats with minimums the zero point minimum / scale, rounded to float32 once. In a group with scale zero all weights
are -minimum: its codes become 0, with the scale -minimum and the zero point -1.

Source: ggml-quants.c and gguf-py of https://github.com/ggml-org/llama.cpp
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.linear_int4 import SYMMETRIC_ZERO
from .importers import ImportFormatError
from .scheme import Int4, Int8Groups

_CHUNK = 1 << 22  # weights decoded at a time
LARGEST_ZERO = 60_000.0
"""Largest zero point that float16 can hold. The weights of a group beyond it are equal up to 1/4000."""


class Grid(NamedTuple):
    """Scales and minimums [..., groups] float32 of blocks; minimums is None if all are 0."""

    scales: Tensor
    minimums: Tensor | None = None


@dataclass(frozen=True)
class BlockFormat:
    """The layout of a format's blocks, and the scheme that stores its weights unchanged.

    codes, grid: functions of blocks [rows, blocks, nbytes] uint8 that return the codes [rows, blocks, weights] uint8,
    from 0 on (for Q8_0 the bytes of int8), and the scales and minimums [rows, blocks, groups]. zero: the code of the
    weight 0 if there are no minimums.
    """

    weights: int
    nbytes: int
    scheme: Int4 | Int8Groups
    codes: Callable[[Tensor], Tensor]
    grid: Callable[[Tensor], Grid]
    zero: int = 0

    def split(self, data: Tensor) -> Tensor:
        """The blocks [rows, blocks, nbytes] of rows [rows, bytes]."""
        return data.unflatten(1, (-1, self.nbytes))

    def chunks(self, data: Tensor) -> tuple[Tensor, ...]:
        """The rows of `data` in pieces that are decoded at a time."""
        return data.split(max(1, _CHUNK // (data.shape[1] // self.nbytes * self.weights)))


def dequantized(kind: str, data: Tensor) -> Tensor:
    """The weights [rows, in] float32 of rows [rows, bytes] uint8, rounded like ggml's own decoder."""
    form = FORMATS[kind]
    blocks = form.split(data)
    scales, minimums = form.grid(blocks)
    codes = form.codes(blocks).view(torch.int8) - form.zero
    weights = codes.unflatten(2, (scales.shape[2], -1)).float() * scales[..., None]
    return (weights if minimums is None else weights - minimums[..., None]).flatten(1)


def packed_codes(kind: str, data: Tensor) -> Tensor:
    """The codes of rows [rows, bytes] uint8 in the layout of `FORMATS[kind].scheme`."""
    form = FORMATS[kind]
    inputs = data.shape[1] // form.nbytes * form.weights
    is_int4 = isinstance(form.scheme, Int4)
    out = torch.empty(len(data), inputs // 2 if is_int4 else inputs, dtype=torch.uint8 if is_int4 else torch.int8)
    done = 0
    for piece in form.chunks(data):
        blocks = form.split(piece)
        codes = form.codes(blocks)
        varied = None if form.scheme.symmetric else form.grid(blocks).scales != 0
        if varied is not None and not bool(varied.all()):
            codes = codes * varied.repeat_interleave(form.weights // varied.shape[2], 2)
        flat = codes.flatten(1)
        out[done : done + len(piece)] = _pairs(flat) if is_int4 else flat.view(torch.int8) - form.zero
        done += len(piece)
    return out


def packed_scales(kind: str, data: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scales, and zero points or None, of rows [rows, bytes] uint8 in the layout of `FORMATS[kind].scheme`.

    Raises ImportFormatError for numbers that the scheme cannot store.
    """
    form = FORMATS[kind]
    pieces = [_scales(form, piece) for piece in form.chunks(data)]
    zeros = [piece[1] for piece in pieces if piece[1] is not None]
    return torch.cat([piece[0] for piece in pieces]), torch.cat(zeros) if zeros else None


def _scales(form: BlockFormat, data: Tensor) -> tuple[Tensor, Tensor | None]:
    scales, minimums = (None if part is None else part.flatten(1) for part in form.grid(form.split(data)))
    assert scales is not None
    parts = [scales] if minimums is None else [scales, minimums]
    if not all(bool(extreme.isfinite()) for part in parts for extreme in part.aminmax()):
        raise ImportFormatError("has scales or minimums that are not finite; the file is damaged")
    if form.scheme.symmetric:
        return scales if form.scheme.float32_scales else scales.half(), None
    assert minimums is not None
    constant = scales == 0
    scales = torch.where(constant, -minimums, scales)
    zeros = torch.where(constant, -1.0, minimums / torch.where(constant, 1.0, scales))
    if bool((zeros.abs() > LARGEST_ZERO).any()):
        raise ImportFormatError(f"has a group whose minimum is more than {LARGEST_ZERO:,.0f} times its scale")
    return scales, zeros


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 in bytes `at` and `at` + 1 of blocks [..., bytes], as float32 [..., 1]."""
    return blocks.view(torch.float16)[..., at // 2 : at // 2 + 1].float()


def _words(data: Tensor) -> Tensor:
    """Bytes [..., n] as int32 [..., n / 4], for which operations are several times as fast."""
    return data.contiguous().view(torch.int32)


def _pairs(codes: Tensor) -> Tensor:
    """Codes [rows, in] uint8 of 0 .. 15, packed two per byte like int4: [rows, in / 2]."""
    both = codes.view(torch.int16)
    return ((both & 15) | (both >> 4)).to(torch.uint8)


def _nibbles(data: Tensor, run: int) -> Tensor:
    """The codes in bytes [..., n]: for each `run` bytes first all low halves, then all high ones."""
    runs = _words(data).unflatten(-1, (-1, run // 4))
    return torch.stack((runs & 0x0F0F0F0F, runs >> 4 & 0x0F0F0F0F), -2).flatten(-3).view(torch.uint8)


def _fifth_bits(data: Tensor) -> Tensor:
    """32 bits in 4 bytes, the lowest first, as 16 or 0: [..., 4] to [..., 32]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((data[..., None] >> shifts & 1) << 4).flatten(-2)


def _d(blocks: Tensor) -> Grid:
    return Grid(_half(blocks, 0))


def _d_m(blocks: Tensor) -> Grid:
    return Grid(_half(blocks, 0), -_half(blocks, 2))


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[..., 2:], 16)


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[..., 4:], 16)


def _q5_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[..., 6:], 16) | _fifth_bits(blocks[..., 2:6])


def _q5_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[..., 8:], 16) | _fifth_bits(blocks[..., 4:8])


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].contiguous()


def _k_grid(blocks: Tensor) -> Grid:
    """s and m [..., 8] are six bits wide. The first four are in bytes 0 .. 3 and 4 .. 7 of 12; the others have their
    low four bits in the halves of bytes 8 .. 11, and their upper two above the first ones."""
    fields = blocks[..., 4:16].flatten(0, 1).T.contiguous()  # long rows, for which operations are fast
    first, second, third = fields.split(4)
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)))
    minimums = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)))
    shape = (*blocks.shape[:2], 8)
    return Grid(*((_half(blocks, at).view(-1) * six).T.reshape(shape) for at, six in ((0, scales), (2, minimums))))


def _q4_k(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[..., 16:], 32)


def _q5_k(blocks: Tensor) -> Tensor:
    words = _words(blocks[..., 16:48]).flatten(0, 1).T.contiguous()  # long rows, as in `_k_grid`
    shifts = torch.arange(8, dtype=torch.int32)[:, None, None]
    fifth = (words >> shifts & 0x01010101) << 4  # bit g of byte i belongs to input 32 g + i
    fifth = fifth.permute(2, 0, 1).reshape(*blocks.shape[:2], -1)
    return (_words(_nibbles(blocks[..., 48:], 32)) | fifth).view(torch.uint8)


def _q6_k(blocks: Tensor) -> Tensor:
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.int32)[:, None]
    upper = (_words(blocks[..., 128:192]).unflatten(-1, (2, 1, 8)) >> shifts & 0x03030303) << 4
    return (_words(_nibbles(blocks[..., :128], 64)) | upper.flatten(-3)).view(torch.uint8)


def _q6_k_grid(blocks: Tensor) -> Grid:
    return Grid(_half(blocks, 208) * blocks[..., 192:208].view(torch.int8))


_INT4_ZEROS = Int4(32, symmetric=False, float32_scales=True)
_INT8_ZEROS = Int8Groups(32, symmetric=False, float32_scales=True)

FORMATS: Mapping[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, 18, Int4(32), _q4_0, _d, zero=SYMMETRIC_ZERO),
    "Q4_1": BlockFormat(32, 20, _INT4_ZEROS, _q4_1, _d_m),
    "Q5_0": BlockFormat(32, 22, Int8Groups(32), _q5_0, _d, zero=16),
    "Q5_1": BlockFormat(32, 24, _INT8_ZEROS, _q5_1, _d_m),
    "Q8_0": BlockFormat(32, 34, Int8Groups(32), _q8_0, _d),
    "Q4_K": BlockFormat(256, 144, _INT4_ZEROS, _q4_k, _k_grid),
    "Q5_K": BlockFormat(256, 176, _INT8_ZEROS, _q5_k, _k_grid),
    "Q6_K": BlockFormat(256, 210, Int8Groups(16, float32_scales=True), _q6_k, _q6_k_grid, zero=32),
}
"""The supported formats, by gguf-py's names."""
