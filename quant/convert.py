"""Writes a quantized checkpoint: safetensors files whose tensors are passed one by one, in any order.

The shapes and dtypes of all tensors are known in advance, and so are their offsets; only one tensor is in memory at a
time. The codes are first in a file: their sizes are multiples of 16 bytes, so that they and the floats after them are
aligned for the kernels that read the mapped file; scales of one byte are last. Files have at most SHARD_BYTES; several
files have an index. They are written under temporary names that no other run uses, and renamed once all of them are
complete.
Format: https://github.com/huggingface/safetensors
"""

import errno
import json
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .scheme import PARTS, Stored

SHARD_BYTES = 5_000_000_000
INDEX_FILE = "model.safetensors.index.json"
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The dtypes of the format that torch has."""
_ALIGNMENT = 64


def spelled(dtype: torch.dtype) -> str:
    """The dtype as safetensors spells it, such as BF16."""
    return next(name for name, known in TORCH_DTYPES.items() if known == dtype)


def shard_name(number: int, count: int) -> str:
    """The name of file `number`, from 1, of `count`."""
    return f"model-{number:05}-of-{count:05}.safetensors"


class CheckpointWriter:
    """Writes tensors into `folder`: call `write` once for each expected tensor, then `finish`.

    As a context manager it removes unfinished files (*.part) at the end of the block. expected: by name the shape, and
    the dtype as the first of its dtypes; metadata: strings for the headers, which `finish` may change but not lengthen.
    """

    def __init__(
        self,
        folder: Path,
        expected: Mapping[str, Stored],
        metadata: Mapping[str, str],
        shard_bytes: int = SHARD_BYTES,
    ):
        self._folder = folder
        shards = _shards(expected, shard_bytes)
        names = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
        files = ["model.safetensors"] if len(shards) == 1 else names
        self._shards = [_Shard(folder / name, tensors, metadata) for name, tensors in zip(files, shards, strict=True)]
        self._left = {name: shard for shard in self._shards for name in shard.tensors}
        try:
            for shard in self._shards:
                shard.create()
        except BaseException:
            self._discard()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor. Raises ValueError for an unexpected or repeated one."""
        shard = self._left.pop(name, None)
        if shard is None or tensor.shape != shard.tensors[name].shape or tensor.dtype != shard.tensors[name].dtypes[0]:
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} does not belong into this checkpoint")
        shard.write(name, tensor)

    def finish(self, metadata: Mapping[str, str]) -> list[Path]:
        """Write headers and index, give the files their final names and return them.

        Raises ValueError if a tensor is missing, FileExistsError if a file with one of the names has appeared in the
        folder.
        """
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were not written, the first is {next(iter(self._left))}")
        if len(self._shards) > 1:
            weight_map = {name: shard.file.name for shard in self._shards for name in shard.tensors}
            index = {"metadata": {"total_size": sum(shard.nbytes for shard in self._shards)}, "weight_map": weight_map}
            with _create(self._folder / INDEX_FILE) as file:
                file.write(json.dumps(index, indent=1).encode())
        for shard in self._shards:
            shard.complete(metadata)
        return [shard.rename() for shard in self._shards]

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._discard()

    def _discard(self) -> None:
        for shard in self._shards:
            shard.part.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Span:
    start: int
    end: int


class _Shard:
    """One file; its tensors in the order of their bytes."""

    def __init__(self, file: Path, tensors: dict[str, Stored], metadata: Mapping[str, str]):
        self.file = file
        self.tensors = tensors
        self._spans: dict[str, _Span] = {}
        position = 0
        for name, stored in tensors.items():
            self._spans[name] = _Span(position, position + _nbytes(stored))
            position = self._spans[name].end
        self.nbytes = position
        self.part = file.with_name(f"{file.name}.{secrets.token_hex(8)}.part")
        room = 8 + len(self._header(metadata))
        self._data_start = -(-room // _ALIGNMENT) * _ALIGNMENT

    def create(self) -> None:
        """Create the temporary file in its final size."""
        with _create(self.part) as opened:
            opened.truncate(self._data_start + self.nbytes)

    def write(self, name: str, tensor: Tensor) -> None:
        with self.part.open("r+b") as file:
            file.seek(self._data_start + self._spans[name].start)
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(file)

    def complete(self, metadata: Mapping[str, str]) -> None:
        """Write the header, and sync the file to disk."""
        room = self._data_start - 8
        header = self._header(metadata).ljust(room)
        if len(header) != room:
            raise ValueError("the metadata is longer than what was announced")
        with self.part.open("r+b") as file:
            file.write(struct.pack("<Q", room) + header)
            file.flush()
            os.fsync(file.fileno())

    def rename(self) -> Path:
        """Give the file its final name."""
        if os.path.lexists(self.file):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.file))
        return self.part.rename(self.file)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        entries = {
            name: {
                "dtype": spelled(stored.dtypes[0]),
                "shape": list(stored.shape),
                "data_offsets": [self._spans[name].start, self._spans[name].end],
            }
            for name, stored in self.tensors.items()
        }
        return json.dumps({"__metadata__": {"format": "pt", **metadata}, **entries}).encode()


def _create(path: Path) -> BinaryIO:
    """A new file to write to. Raises FileExistsError if the name exists, also as a link."""
    return path.open("xb")


def _shards(expected: Mapping[str, Stored], most: int) -> list[dict[str, Stored]]:
    """Divide the tensors into files of at most `most` bytes (a larger tensor has its own), smallest items first."""
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name, stored in expected.items():
        nbytes = _nbytes(stored)
        if shards[-1] and size + nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = stored
        size += nbytes

    def order(item: tuple[str, Stored]) -> tuple[int, int]:
        name, size = item[0], item[1].dtypes[0].itemsize
        return 1 if size > 1 else 2 if name.endswith(PARTS[1]) else 0, -size

    return [dict(sorted(shard.items(), key=order)) for shard in shards]


def _nbytes(stored: Stored) -> int:
    return prod(stored.shape) * stored.dtypes[0].itemsize
