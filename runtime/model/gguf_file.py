"""GGUF files: metadata and a table of tensors, checked completely before they are used to read or allocate anything.

A file is a header (magic, version, numbers of tensors and metadata values), the metadata (key, type, value), the table
(name, sizes with the innermost first, type, offset), and the data, in which each tensor begins at a multiple of the
alignment. Little-endian files of the versions 2 and 3 are read.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...quant.ggml import FORMATS
from ..errors import CheckpointError
from ..files import shown
from .mapped_file import MappedFile
from .safetensors_header import MAX_ELEMENTS, MAX_TENSORS, Contents, shown_shape

MAX_VALUES = 1 << 12
MAX_KEY_BYTES = 1 << 10
MAX_NAME_BYTES = 1 << 8
MAX_STRING_BYTES = 1 << 26
MAX_STRINGS = 1 << 20
MAX_ARRAY_BYTES = 1 << 28
MAX_RANK = 4
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32

DENSE_TYPES = ("F32", "F16", "BF16")
"""The types without blocks."""
_NUMBERS = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}
# Weights and bytes per block. Types without a decoder are listed so that errors can name them.
_BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    **{name: (form.weights, form.nbytes) for name, form in FORMATS.items()},
}
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_MAGIC = b"GGUF"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type, its shape with the outermost dimension first, and where its bytes are in the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    metadata: int, float, bool or str values, lists of str or bool, and numpy arrays of numbers.
    tensors: by name, in the order of the table.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class GgufFile:
    """A memory-mapped GGUF file with its checked header. label: its name in errors."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        """Raises CheckpointError naming the file, and the key or tensor, for any inconsistency."""
        self.path = path
        self.label = label or path.name
        self.mapped = MappedFile(path, self.label)
        header = parse_gguf_header(self.mapped.map, self.label)
        self.metadata = header.metadata
        self.tensors = header.tensors


def parse_gguf_header(data: Contents, file: str) -> GgufHeader:
    """The header of the whole GGUF file `data`. Raises CheckpointError naming `file` for a damaged or forged one."""
    cursor = _Cursor(data, file)
    if cursor.take(4) != _MAGIC:
        raise CheckpointError(f"{file} is not a GGUF file; check the path.")
    version = cursor.number("<u4")
    if version not in (2, 3):
        kind = "big-endian, or " if version in (2 << 24, 3 << 24) else ""
        raise CheckpointError(f"{file} is {kind}of GGUF version {version}; this runtime reads versions 2 and 3.")
    tensors, values = cursor.number("<u8"), cursor.number("<u8")
    if tensors > MAX_TENSORS or values > MAX_VALUES:
        raise CheckpointError(
            f"{file} claims {tensors:,} tensors and {values:,} metadata values; at most {MAX_TENSORS:,} and "
            f"{MAX_VALUES:,} are accepted."
        )
    metadata: dict[str, Any] = {}
    for _ in range(values):
        key = cursor.string(MAX_KEY_BYTES, "a metadata key")
        if key in metadata:
            raise CheckpointError(f"{file}: the metadata key {shown(key)} occurs twice; the file is damaged.")
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(f"{file}: general.alignment is {shown(alignment)}; expected a power of two from 8 on.")
    table = [_table_entry(cursor) for _ in range(tensors)]
    start = -(-cursor.position // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, kind, shape, nbytes, offset in table:
        if name in found:
            raise CheckpointError(f"{file}: tensor {shown(name)} occurs twice; the file is damaged.")
        if offset % alignment:
            raise CheckpointError(f"{file}: tensor {shown(name)} is not aligned to {alignment} bytes; it is damaged.")
        found[name] = GgufTensor(kind, shape, start + offset, start + offset + nbytes)
    _check_coverage(found.items(), start, len(data), alignment, file)
    return GgufHeader(metadata, found)


class _Cursor:
    """Reads a file from front to back, never past its end."""

    def __init__(self, data: Contents, file: str) -> None:
        self.file = file
        self.position = 0
        self._data = data
        self._size = len(data)

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self._size:
            raise CheckpointError(f"{self.file} is truncated: its header ends beyond the file; download it again.")
        piece = self._data[self.position : end]
        self.position = end
        return piece

    def number(self, dtype: str) -> Any:
        """A Python int or float."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def string(self, most: int, what: str) -> str:
        length = struct.unpack("<Q", self.take(8))[0]
        if length > most:
            raise CheckpointError(
                f"{self.file}: {what} has {length:,} bytes; at most {most:,} are accepted. The file is damaged."
            )
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.file}: {what} is not UTF-8 text; the file is damaged.") from None

    def value(self, key: str) -> Any:
        kind = self.number("<u4")
        what = f"the metadata value {shown(key)}"
        if kind == _ARRAY:
            return self._array(what)
        if kind == _STRING:
            return self.string(MAX_STRING_BYTES, what)
        return self._bool(what) if kind == _BOOL else self.number(self._dtype(kind, what))

    def _array(self, what: str) -> Any:
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in (_STRING, _BOOL):
            if count > MAX_STRINGS:
                raise CheckpointError(f"{self.file}: {what} has {count:,} items; at most {MAX_STRINGS:,} are accepted.")
            if kind == _BOOL:
                return [self._bool(what) for _ in range(count)]
            return [self.string(MAX_STRING_BYTES, what) for _ in range(count)]
        dtype = np.dtype(self._dtype(kind, what))
        if count * dtype.itemsize > MAX_ARRAY_BYTES:
            raise CheckpointError(
                f"{self.file}: {what} has {count:,} numbers; at most {MAX_ARRAY_BYTES:,} bytes of them are accepted."
            )
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def _bool(self, what: str) -> bool:
        byte = self.take(1)[0]
        if byte > 1:
            raise CheckpointError(f"{self.file}: {what} is {byte} where a truth value is 0 or 1; the file is damaged.")
        return bool(byte)

    def _dtype(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            nested = ", an array of arrays" if kind == _ARRAY else ""
            raise CheckpointError(f"{self.file}: {what} has the type {kind}{nested}, which is not supported.")
        return _SCALARS[kind]


def _table_entry(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape, bytes and offset of the next tensor."""
    name = cursor.string(MAX_NAME_BYTES, "a tensor's name")
    where = f"{cursor.file}: tensor {shown(name)}"
    rank = cursor.number("<u4")
    if rank > MAX_RANK:
        raise CheckpointError(f"{where} has {rank:,} dimensions; at most {MAX_RANK} are accepted.")
    shape = tuple(cursor.number("<u8") for _ in range(rank))[::-1]
    if 0 in shape or math.prod(shape) > MAX_ELEMENTS:
        raise CheckpointError(f"{where} has the impossible shape {shown_shape(shape)}; the file is damaged.")
    number, offset = cursor.number("<u4"), cursor.number("<u8")
    if number not in _NUMBERS:
        raise CheckpointError(
            f"{where} has the type number {number}, which this runtime does not read; it reads "
            f"{', '.join(_NUMBERS.values())}."
        )
    kind = _NUMBERS[number]
    weights, nbytes = _BLOCKS[kind]
    if (shape[-1] if shape else 1) % weights:
        raise CheckpointError(
            f"{where} has the shape {shown_shape(shape)}, whose rows are not whole blocks of {kind} "
            f"({weights} weights)."
        )
    return name, kind, shape, math.prod(shape) // weights * nbytes, offset


def _check_coverage(
    tensors: Iterable[tuple[str, GgufTensor]], start: int, size: int, alignment: int, file: str
) -> None:
    """The tensors must cover the bytes from `start` to `size` once each, up to padding for the alignment."""
    position = start
    for name, tensor in sorted(tensors, key=lambda item: (item[1].start, item[1].end)):
        if tensor.end > size:
            raise CheckpointError(
                f"{file}: tensor {shown(name)} ends beyond the file; it is truncated, download it again."
            )
        if not 0 <= tensor.start - position < alignment:
            problem = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise CheckpointError(f"{file}: tensor {shown(name)} {problem}; the file is damaged or forged.")
        position = tensor.end
    if size - position >= alignment:
        raise CheckpointError(
            f"{file} has {size - position:,} bytes that belong to no tensor; it is damaged or forged."
        )
