"""audio.cpp's packages: one GGUF file with the tensors of a checkpoint under their own names, and its text files.

    audiocpp.tensor_names               the real name of each tensor; the one in the table is the same, or
                                        _audiocpp.<number> where it would be too long for it
    audiocpp.tensor_ranks, .._shapes    ranks, and all shapes one after the other, outermost dimension first
    audiocpp.embedded_files.names       with .offsets (one more) and .data (bytes), or with .contents (strings)

Names may have the namespace `weights.` or `weights:` in front. See https://github.com/0xShug0/audio.cpp
"""

import math
import re
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import shown
from .component_config import COMPONENTS
from .gguf_file import DENSE_TYPES, GgufFile, GgufTensor
from .parameters import canonical_name
from .safetensors_header import MAX_RANK, shown_shape

FAMILY = "audio_flamingo"
MAX_FILES = 64

_NAMES, _RANKS, _SHAPES = "audiocpp.tensor_names", "audiocpp.tensor_ranks", "audiocpp.tensor_shapes"
_FILES = "audiocpp.embedded_files"
_NAMESPACE = re.compile(r"weights[.:]")
# A plain file name, without a leading dot, at the top or in one of the component folders.
_FILE_NAME = re.compile(rf"(?:(?:{'|'.join(COMPONENTS)})/)?[A-Za-z0-9_][A-Za-z0-9_.-]{{0,100}}")


def is_package(file: GgufFile) -> bool:
    """Whether audio.cpp wrote the file."""
    return _NAMES in file.metadata


def package_contents(file: GgufFile) -> dict[str, bytes]:
    """The embedded files by name. Raises CheckpointError for impossible names, offsets or counts."""
    family = file.metadata.get("audiocpp.model_spec.family", FAMILY)
    if family != FAMILY:
        raise CheckpointError(f"{file.label} holds a model of the family {shown(family)}, not {FAMILY}.")
    names = _strings(file, f"{_FILES}.names")
    if len(names) > MAX_FILES or len(set(names)) != len(names):
        raise CheckpointError(
            f"{file.label} embeds {len(names):,} files; expected at most {MAX_FILES}, each with its own name."
        )
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{file.label} embeds a file called {shown(name)}, which is not a plain name.")
    if f"{_FILES}.contents" in file.metadata:
        contents = [text.encode() for text in _strings(file, f"{_FILES}.contents")]
        if len(contents) != len(names):
            raise CheckpointError(f"{file.label} embeds {len(contents)} files under {len(names)} names; it is damaged.")
        return dict(zip(names, contents, strict=True))
    offsets, data = _numbers(file, f"{_FILES}.offsets"), _numbers(file, f"{_FILES}.data")
    if data.itemsize != 1:
        raise CheckpointError(f"{file.label}: {_FILES}.data are not bytes; the file is damaged.")
    ends = [int(offset) for offset in offsets]
    if len(ends) != len(names) + 1 or ends[0] != 0 or ends[-1] != len(data) or ends != sorted(ends):
        raise CheckpointError(
            f"{file.label}: {_FILES}.offsets do not cut {len(data):,} bytes into {len(names)} files; it is damaged."
        )
    whole = data.tobytes()
    return {name: whole[start:end] for name, start, end in zip(names, ends, ends[1:], strict=False)}


def package_tensors(file: GgufFile) -> list[tuple[str, str | None, tuple[int, ...], GgufTensor]]:
    """Name in the table, canonical name, shape and place of each tensor, in the order of the table.

    Raises CheckpointError if names, ranks and shapes do not match the tensors of the table.
    """
    names, ranks, shapes = _strings(file, _NAMES), _numbers(file, _RANKS), _numbers(file, _SHAPES)
    if not len(names) == len(ranks) == len(file.tensors):
        raise CheckpointError(
            f"{file.label} has {len(file.tensors):,} tensors, {len(names):,} names and {len(ranks):,} ranks for them; "
            "it is damaged."
        )
    found = []
    position = 0
    for index, (stored_name, tensor) in enumerate(file.tensors.items()):
        where = f"{file.label}: tensor {shown(names[index])}"
        if stored_name not in (names[index], f"_audiocpp.{index}"):
            raise CheckpointError(f"{where} is {shown(stored_name)} in the table; the file is damaged.")
        rank = int(ranks[index])
        if not 0 <= rank <= min(MAX_RANK, len(shapes) - position):
            raise CheckpointError(f"{where} has the impossible rank {rank}; the file is damaged.")
        shape = tuple(int(size) for size in shapes[position : position + rank])
        position += rank
        cuts_rows = tensor.kind not in DENSE_TYPES and shape[-1:] != tensor.shape[-1:]
        if min(shape, default=1) < 1 or math.prod(shape) != math.prod(tensor.shape) or cuts_rows:
            raise CheckpointError(
                f"{where} has the shape {shown_shape(shape)}, but {shown_shape(tensor.shape)} in the table; the file "
                "is damaged."
            )
        real = _NAMESPACE.sub("", names[index], count=1) if _NAMESPACE.match(names[index]) else names[index]
        found.append((names[index], canonical_name(real), shape, tensor))
    if position != len(shapes):
        raise CheckpointError(
            f"{file.label}: {_SHAPES} has {len(shapes) - position} sizes of no tensor; it is damaged."
        )
    return found


def _strings(file: GgufFile, key: str) -> list[str]:
    value: Any = file.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{file.label}: {key} is not a list of strings; the file is damaged.")
    return value


def _numbers(file: GgufFile, key: str) -> "np.ndarray[Any, np.dtype[Any]]":
    value: Any = file.metadata.get(key)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        raise CheckpointError(f"{file.label}: {key} is not a list of whole numbers; the file is damaged.")
    return value
