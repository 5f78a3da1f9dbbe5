"""The named schemes: the tensors stored for a weight [out, in], and the product that reads them.

    scheme        codes                    scales                      zeros               bits per weight
    int8          [out, in] int8           [out] float32               none                8
    int8-w8a8     the same; inputs of the product are rounded to int8 too, one scale per token
    fp8           [out, in] e4m3           [out] float32               none                8
                  inputs of the product are rounded to e4m3 too, one scale per token
    int8, groups  [out, in] int8           [out, in / group] 16 bits   none                8 + 16 / group
    with zeros    the same                 the same                    like scales         8 + 32 / group
    int4          [out, in / 2] uint8      [out, in / group] 16 bits   none                4 + 16 / group
    int4, zeros   the same                 the same                    like scales         4 + 32 / group
    groups, f32   the same, with scales and zeros of 32 bits
    int4, w4a8    the same, with zeros or without; inputs of the product are rounded to int8 too, one per group
    int3          [out, 3 in / 8] uint8    [out, in / group] 16 bits   none                3 + 16 / group
    nf4           [out, in / 2] uint8      [out, in / 64] float32      none                4.5
    nvfp4         [out, in / 2] uint8      [out, in / 16] e4m3         [out] float32       4.5
    mxfp4         [out, in / 2] uint8      [out, in / 32] uint8        none                4.25

On GPUs few rows of inputs are not rounded: they use the kernels of int8 and int4. fp8 rounds no few rows anywhere, and
none on GPUs that cannot multiply e4m3. nvfp4 has no zero points: its scales of channels are in their place.

The byte layouts are in `int8`, `fp8`, `int4`, `int3`, `nf4` and `nvfp4`. In a file, the layer X has the tensors
X.weight_codes, X.weight_scales and X.weight_zeros; X.bias is unchanged. A scheme is written as its name, followed by
the group if it has one, "zeros" if there are zero points, "f32" if scales have 32 bits, and "w4a8": int4-g64,
int4-g128-zeros, int4-g32-w4a8, int3-g64, int8-g32, int8-g16-f32.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.errors import AfnextError
from ..kernels.linear_int3 import BLOCK_BYTES
from ..kernels.linear_int3 import BLOCK_SIZE as INT3_BLOCK_SIZE
from ..kernels.linear_int4 import GROUP_SIZES, SYMMETRIC_ZERO, prepare_int4
from ..kernels.linear_int8 import INPUT_MULTIPLE
from ..kernels.linear_int8_groups import GROUP_SIZES as INT8_GROUP_SIZES
from ..kernels.linear_norm import PRODUCTS, linear_norm
from ..kernels.linear_nvfp4 import E8M0, INPUTS, LEVELS, MXFP4_BLOCK, NVFP4_BLOCK, block_scales
from ..kernels.packed_weight import Packed
from ..kernels.quantize_rows import E4M3, LARGEST
from .fp8 import dequantize_fp8, quantize_fp8
from .int3 import dequantize_int3, fit_int3
from .int4 import dequantize_int4, fit_int4
from .int8 import dequantize_int8, dequantize_int8_groups, quantize_int8, quantize_int8_groups
from .nf4 import BLOCK_SIZE, dequantize_nf4, quantize_nf4
from .nvfp4 import dequantize_nvfp4, quantize_mxfp4, quantize_nvfp4

PARTS = tuple(f"weight_{field}" for field in Packed._fields)
"""The names of the parts of `Packed` in a checkpoint, after the layer's name."""
_CHUNK = 1 << 20  # weights quantized at a time: intermediate results take some 30 MB


class SchemeError(AfnextError):
    """A scheme is unknown, does not fit a layer, or the tensors stored for it are damaged."""


class Stored(NamedTuple):
    """The required shape and the allowed dtypes of a tensor in a file."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


class Scheme(ABC):
    """How the weights [out, in] of a layer are stored and multiplied.

    int8_inputs: whether the product's inputs are rounded to int8 as well.
    """

    int8_inputs: bool = False

    @property
    def rounds_inputs(self) -> bool:
        """Whether the product rounds its inputs, to int8 or e4m3, where it has many rows."""
        return self.int8_inputs

    @property
    @abstractmethod
    def product(self) -> str:
        """The operation that multiplies by the weights, a key of `linear_norm.PRODUCTS`."""

    @abstractmethod
    def stored(self, shape: tuple[int, ...]) -> dict[str, Stored]:
        """The tensors stored for a weight of this shape, by the names of `PARTS`.

        Raises SchemeError if the scheme cannot store such a weight.
        """

    @abstractmethod
    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out, in], rounded to `dtype` once."""

    @abstractmethod
    def largest_weight(self, scales: Tensor, zeros: Tensor | None) -> float:
        """A bound on the absolute value of every weight with these finite scales and zero points."""

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """x W^T + bias + residual for x: [..., in] and residual: [..., out]. Returns [..., out] in the dtype of x."""
        return PRODUCTS[self.product].linear(x, packed, bias, residual)

    def linear_norm(
        self, x: Tensor, packed: Packed, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """h = residual + x W^T. Returns (RMSNorm of h, h), both like residual; see `kernels/linear_norm.py`."""
        return linear_norm(self.product, x, packed, residual, norm, eps)

    def swiglu(self, x: Tensor, gate: Packed, up: Packed) -> Tensor:
        """silu(x G^T) * (x U^T) for x: [..., in]. Returns [..., out] in the dtype of x."""
        return PRODUCTS[self.product].swiglu(x, gate, up)

    def prepare(self, packed: Packed, dtype: torch.dtype) -> None:  # noqa: B027 - most schemes have nothing to prepare
        """Let the product precompute, before its first call with x in `dtype`, the data that it keeps beside the
        weight."""

    @abstractmethod
    def _quantize(self, rows: Tensor, importance: Tensor | None) -> Packed:
        """Quantize some channels."""

    def quantize(
        self,
        weight: Tensor,
        importance: Tensor | None = None,
        device: torch.device | str | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Packed:
        """Round a weight [out, in] of any floating dtype, on `device` (by default where it is).

        importance: [in], weights the squared error of each input channel if the scheme searches for scales. Channels
        are processed in chunks, so memory is needed only for the result and one chunk; `progress` is called with the
        number of channels done after each. Raises SchemeError if the shape does not fit, and ValueError for weights
        that are not finite.
        """
        expected = self.stored(tuple(weight.shape))
        device = weight.device if device is None else torch.device(device)
        importance = None if importance is None else importance.to(device)
        whole: dict[str, Tensor] = {}
        done = 0
        for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
            for name, part in self._quantize(rows.to(device), importance).named().items():
                if name not in whole:
                    whole[name] = torch.empty(expected[name].shape, dtype=part.dtype, device=device)
                whole[name][done : done + len(part)] = part
            done += len(rows)
            progress(done)
        return Packed(*(whole[part] for part in PARTS if part in whole))


@dataclass(frozen=True)
class Int8(Scheme):
    """One scale per channel. int8_inputs: round the product's inputs to int8 as well (W8A8)."""

    int8_inputs: bool = False

    def __str__(self) -> str:
        return "int8-w8a8" if self.int8_inputs else "int8"

    @property
    def product(self) -> str:
        """See `Scheme`."""
        return "linear_w8a8" if self.int8_inputs else "linear_int8"

    def stored(self, shape: tuple[int, ...]) -> dict[str, Stored]:
        """See `Scheme`."""
        return _by_channel(shape, self, torch.int8)

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        return dequantize_int8(packed.codes, packed.scales, dtype)

    def largest_weight(self, scales: Tensor, zeros: Tensor | None) -> float:
        """See `Scheme`."""
        return 128 * _largest(scales)

    def _quantize(self, rows: Tensor, importance: Tensor | None) -> Packed:
        return Packed(*quantize_int8(rows))


@dataclass(frozen=True)
class Fp8(Scheme):
    """The 8-bit float e4m3, one scale per channel. The product's inputs are rounded to e4m3 as well (W8A8), see
    `kernels.linear_fp8.rounds_inputs`."""

    def __str__(self) -> str:
        return "fp8"

    @property
    def rounds_inputs(self) -> bool:
        """See `Scheme`."""
        return True

    @property
    def product(self) -> str:
        """See `Scheme`."""
        return "linear_fp8"

    def stored(self, shape: tuple[int, ...]) -> dict[str, Stored]:
        """See `Scheme`."""
        return _by_channel(shape, self, E4M3)

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        return dequantize_fp8(packed.codes, packed.scales, dtype)

    def largest_weight(self, scales: Tensor, zeros: Tensor | None) -> float:
        """See `Scheme`."""
        return LARGEST[E4M3] * _largest(scales)

    def _quantize(self, rows: Tensor, importance: Tensor | None) -> Packed:
        return Packed(*quantize_fp8(rows))


@dataclass(frozen=True)
class Int8Groups(Scheme):
    """One scale, and if not symmetric one zero point, for each `group_size` inputs of a channel. float32_scales: scales
    and zero points are float32, as exact copies of other formats need; otherwise they have 16 bits."""

    group_size: int
    symmetric: bool = True
    float32_scales: bool = False

    def __post_init__(self) -> None:
        if self.group_size not in INT8_GROUP_SIZES:
            raise SchemeError(
                f"int8 has groups of {', '.join(map(str, INT8_GROUP_SIZES))} inputs, not {self.group_size}"
            )

    def __str__(self) -> str:
        return f"int8-g{self.group_size}{_suffix(self)}"

    @property
    def product(self) -> str:
        """See `Scheme`."""
        return "linear_int8_groups"

    def stored(self, shape: tuple[int, ...]) -> dict[str, Stored]:
        """See `Scheme`."""
        out, inner = _matrix(shape, self)
        if inner % self.group_size:
            raise SchemeError(
                f"{inner} inputs are not divisible by groups of {self.group_size}; choose a smaller group, or keep the "
                "layer dense"
            )
        grid = _grid(out, inner, self)
        parts = {"weight_codes": Stored((out, inner), (torch.int8,)), "weight_scales": grid}
        return parts if self.symmetric else {**parts, "weight_zeros": grid}

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        return dequantize_int8_groups(*packed, dtype=dtype)

    def largest_weight(self, scales: Tensor, zeros: Tensor | None) -> float:
        """See `Scheme`."""
        return _largest(scales) * (128 + (0 if zeros is None else _largest(zeros)))

    def _quantize(self, rows: Tensor, importance: Tensor | None) -> Packed:
        return Packed(*quantize_int8_groups(rows, self.group_size, self.symmetric, _scale_dtype(self)))


@dataclass(frozen=True)
class Int4(Scheme):
    """One scale, and if not symmetric one zero point, for each `group_size` inputs of a channel. int8_inputs: round the
    product's inputs to int8 as well, in the same groups (W4A8). float32_scales: see `Int8Groups`."""

    group_size: int = 64
    symmetric: bool = True
    int8_inputs: bool = False
    float32_scales: bool = False

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise SchemeError(f"int4 has groups of {', '.join(map(str, GROUP_SIZES))} inputs, not {self.group_size}")

    def __str__(self) -> str:
        return f"int4-g{self.group_size}{_suffix(self)}{'-w4a8' if self.int8_inputs else ''}"

    @property
    def product(self) -> str:
        """See `Scheme`."""
        return "linear_w4a8" if self.int8_inputs else "linear_int4"

    def stored(self, shape: tuple[int, ...]) -> dict[str, Stored]:
        """See `Scheme`."""
        out, inner = _matrix(shape, self)
        if inner % self.group_size:
            raise SchemeError(
                f"{inner} inputs are not divisible by groups of {self.group_size}; choose a smaller group or int8, or "
                "keep the layer dense"
            )
        grid = _grid(out, inner, self)
        parts = {"weight_codes": Stored((out, inner // 2), (torch.uint8,)), "weight_scales": grid}
        return parts if self.symmetric else {**parts, "weight_zeros": grid}

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        return dequantize_int4(*packed, dtype=dtype)

    def largest_weight(self, scales: Tensor, zeros: Tensor | None) -> float:
        """See `Scheme`."""
        return _largest(scales) * (SYMMETRIC_ZERO if zeros is None else 15 + _largest(zeros))

    def prepare(self, packed: Packed, dtype: torch.dtype) -> None:
        """See `Scheme`."""
        prepare_int4(packed, dtype)

    def _quantize(self, rows: Tensor, importance: Tensor | None) -> Packed:
        return Packed(*fit_int4(rows, self.group_size, self.symmetric, _scale_dtype(self), importance))


@dataclass(frozen=True)
class Int3(Scheme):
    """One scale for each `group_size` inputs of a channel, eight values."""

    group_size: int = 64

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise SchemeError(f"int3 has groups of {', '.join(map(str, GROUP_SIZES))} inputs, not {self.group_size}")

    def __str__(self) -> str:
        return f"int3-g{self.group_size}"

    @property
    def product(self) -> str:
        """See `Scheme`."""
        return "linear_int3"

    def stored(self, shape: tuple[int, ...]) -> dict[str, Stored]:
        """See `Scheme`."""
        out, inner = _matrix(shape, self)
        blocks, rest = divmod(inner, INT3_BLOCK_SIZE)
        if rest:
            raise SchemeError(f"{self} takes inputs in multiples of {INT3_BLOCK_SIZE}, not {inner}; choose int4")
        return {
            "weight_codes": Stored((out, blocks * BLOCK_BYTES), (torch.uint8,)),
            "weight_scales": Stored((out, inner // self.group_size), (torch.bfloat16, torch.float16, torch.float32)),
        }

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        return dequantize_int3(packed.codes, packed.scales, dtype)

    def largest_weight(self, scales: Tensor, zeros: Tensor | None) -> float:
        """See `Scheme`."""
        return _largest(scales) * SYMMETRIC_ZERO

    def _quantize(self, rows: Tensor, importance: Tensor | None) -> Packed:
        return Packed(*fit_int3(rows, self.group_size, importance=importance))


@dataclass(frozen=True)
class NF4(Scheme):
    """The codebook of bitsandbytes' nf4, one scale for each 64 inputs of a channel."""

    def __str__(self) -> str:
        return "nf4"

    @property
    def product(self) -> str:
        """See `Scheme`."""
        return "linear_nf4"

    def stored(self, shape: tuple[int, ...]) -> dict[str, Stored]:
        """See `Scheme`."""
        out, inner = _matrix(shape, self)
        if inner % BLOCK_SIZE:
            raise SchemeError(
                f"{inner} inputs are not divisible by nf4's blocks of {BLOCK_SIZE}; choose int8, or keep the layer "
                "dense"
            )
        return {
            "weight_codes": Stored((out, inner // 2), (torch.uint8,)),
            "weight_scales": Stored((out, inner // BLOCK_SIZE), (torch.float32,)),
        }

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        return dequantize_nf4(packed.codes, packed.scales, dtype)

    def largest_weight(self, scales: Tensor, zeros: Tensor | None) -> float:
        """See `Scheme`."""
        return _largest(scales)

    def _quantize(self, rows: Tensor, importance: Tensor | None) -> Packed:
        return Packed(*quantize_nf4(rows))


@dataclass(frozen=True)
class Fp4(Scheme):
    """The 4-bit float e2m1 with a scale in e4m3 for each 16 inputs of a channel and one in float32 for the channel
    (nvfp4) or, if `powers_of_two`, only one in e8m0 for each 32 inputs (mxfp4)."""

    powers_of_two: bool = False

    def __str__(self) -> str:
        return "mxfp4" if self.powers_of_two else "nvfp4"

    @property
    def product(self) -> str:
        """See `Scheme`."""
        return "linear_nvfp4"

    @property
    def block_size(self) -> int:
        """Inputs that share a scale."""
        return MXFP4_BLOCK if self.powers_of_two else NVFP4_BLOCK

    def stored(self, shape: tuple[int, ...]) -> dict[str, Stored]:
        """See `Scheme`."""
        out, inner = _matrix(shape, self)
        if inner % INPUTS:
            raise SchemeError(
                f"{self} takes inputs in multiples of {INPUTS}, not {inner}; choose int8, or keep the layer dense"
            )
        parts = {
            "weight_codes": Stored((out, inner // 2), (torch.uint8,)),
            "weight_scales": Stored((out, inner // self.block_size), (E8M0 if self.powers_of_two else E4M3,)),
        }
        return parts if self.powers_of_two else {**parts, "weight_zeros": Stored((out,), (torch.float32,))}

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        return dequantize_nvfp4(*packed, dtype=dtype)

    def largest_weight(self, scales: Tensor, zeros: Tensor | None) -> float:
        """See `Scheme`. NaN if a scale is NaN."""
        return LEVELS[-1] * _largest(block_scales(scales, torch.float32)) * (1 if zeros is None else _largest(zeros))

    def _quantize(self, rows: Tensor, importance: Tensor | None) -> Packed:
        return Packed(*(quantize_mxfp4 if self.powers_of_two else quantize_nvfp4)(rows, importance))


def parse_scheme(text: str) -> Scheme | None:
    """Parse a scheme, None for "dense": the inverse of str(scheme); int4 and int3 without a group have the default one.

    Raises SchemeError for anything else.
    """
    plain: Mapping[str, Scheme | None] = {
        "dense": None,
        "int8": Int8(),
        "int8-w8a8": Int8(int8_inputs=True),
        "fp8": Fp8(),
        "int4": Int4(),
        "int4-w4a8": Int4(int8_inputs=True),
        "int3": Int3(),
        "nf4": NF4(),
        "nvfp4": Fp4(),
        "mxfp4": Fp4(powers_of_two=True),
    }
    if text in plain:
        return plain[text]
    match = re.fullmatch(r"(int8|int4|int3)-g(\d{1,4})(-zeros)?(-f32)?(-w4a8)?", text, re.ASCII)
    if match is None or (match[1] == "int8" and match[5]) or (match[1] == "int3" and any(match.groups()[2:])):
        raise SchemeError(
            f"unknown scheme {text[:80]!r}; choose from {', '.join(plain)}, or int3, int4 or int8 with a group, as in "
            "int4-g32, int4-g128-zeros, int3-g128 or int8-g32"
        )
    group, symmetric, wide = int(match[2]), match[3] is None, match[4] is not None
    if match[1] == "int3":
        return Int3(group)
    if match[1] == "int8":
        return Int8Groups(group, symmetric, float32_scales=wide)
    return Int4(group, symmetric, int8_inputs=match[5] is not None, float32_scales=wide)


def _suffix(scheme: Int4 | Int8Groups) -> str:
    return ("" if scheme.symmetric else "-zeros") + ("-f32" if scheme.float32_scales else "")


def _scale_dtype(scheme: Int4 | Int8Groups) -> torch.dtype:
    """The dtype of new scales and zero points."""
    return torch.float32 if scheme.float32_scales else torch.bfloat16


def _by_channel(shape: tuple[int, ...], scheme: Scheme, codes: torch.dtype) -> dict[str, Stored]:
    """Codes of 8 bits and a scale for each channel."""
    out, inner = _matrix(shape, scheme)
    if inner % INPUT_MULTIPLE:
        raise SchemeError(f"{scheme} takes inputs in multiples of {INPUT_MULTIPLE}, not {inner}; keep the layer dense")
    return {"weight_codes": Stored((out, inner), (codes,)), "weight_scales": Stored((out,), (torch.float32,))}


def _grid(out: int, inner: int, scheme: Int4 | Int8Groups) -> Stored:
    """Scales or zero points, one for each group."""
    dtypes = (torch.float32,) if scheme.float32_scales else (torch.bfloat16, torch.float16, torch.float32)
    return Stored((out, inner // scheme.group_size), dtypes)


def _largest(values: Tensor) -> float:
    lowest, highest = values.aminmax()
    return max(-float(lowest), float(highest))


def _matrix(shape: tuple[int, ...], scheme: Scheme) -> tuple[int, int]:
    if len(shape) != 2 or 0 in shape:
        raise SchemeError(f"{scheme} stores weights [out, in], not one of the shape {list(shape)}")
    return shape[0], shape[1]
