"""The header of a safetensors file, checked completely before it is used to read or allocate anything.

A file is an unsigned 64-bit little-endian length n, n bytes of JSON `{name: {dtype, shape, data_offsets}}`, and the
data. The data must be exactly the tensors, one after another, without holes, overlaps or extra bytes. Format:
https://github.com/huggingface/safetensors
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import CheckpointError
from ..files import parse_json_object, shown

MAX_HEADER_BYTES = 1 << 24
MAX_TENSORS = 1 << 15
MAX_RANK = 64
MAX_ELEMENTS = (1 << 63) - 1

ITEM_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its dtype as the format spells it, and its byte offsets `start` and `end` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)


class Contents(Protocol):
    """The bytes of a file, of which only the header is read: `bytes`, a `mmap`, or an object with just the header."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> bytes: ...


def parse_header(data: Contents, file: str) -> dict[str, StoredTensor]:
    """The tensors of the whole safetensors file `data`, by name, in the order of their bytes.

    Raises CheckpointError naming `file`, and the tensor, for a truncated file or an inconsistent header.
    """
    return parse_header_and_metadata(data, file)[0]


def parse_header_and_metadata(data: Contents, file: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Like `parse_header`, with the header's metadata strings."""
    size = len(data)
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(f"{file} is truncated: {size:,} bytes, too few for its header; download it again.")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file} claims a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are accepted.")
    header = parse_json_object(data[8 : 8 + length], f"{file} (its header)", CheckpointError)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map strings to strings; the file is damaged or forged.")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{file} has {len(header):,} tensors; at most {MAX_TENSORS:,} are accepted.")
    tensors = {name: _tensor(entry, f"{file}: tensor {shown(name)}", 8 + length) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_coverage(ordered, 8 + length, size, file)
    return ordered, metadata


def _tensor(entry: Any, where: str, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise CheckpointError(f"{where} has the unknown dtype {shown(dtype)}.")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{where} has a shape that is not a list of at most {MAX_RANK} sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets that are not two rising positions.")
    if math.prod([size for size in shape if size]) > MAX_ELEMENTS:
        raise CheckpointError(f"{where} has a shape with more than 2**63 elements.")
    bits = math.prod(shape) * ITEM_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{where} has shape {shown_shape(shape)} in {dtype}, but its data_offsets span "
            f"{offsets[1] - offsets[0]:,} bytes."
        )
    return StoredTensor(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_coverage(tensors: dict[str, StoredTensor], data_start: int, size: int, file: str) -> None:
    """The tensors, in order, must cover the bytes from `data_start` to `size` once each."""
    position = data_start
    for name, tensor in tensors.items():
        if tensor.end > size:
            raise CheckpointError(
                f"{file}: tensor {shown(name)} ends beyond the file; it is truncated, download it again."
            )
        if tensor.start != position:
            problem = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise CheckpointError(f"{file}: tensor {shown(name)} {problem}; the file is damaged or forged.")
        position = tensor.end
    if position != size:
        raise CheckpointError(
            f"{file} has {size - position:,} bytes that belong to no tensor; it is damaged or forged."
        )


def shown_shape(shape: list[int] | tuple[int, ...]) -> str:
    """The shape as text for an error, at most eight sizes."""
    return f"[{', '.join(map(str, shape[:8]))}{', ...' if len(shape) > 8 else ''}]"


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_ELEMENTS for value in values)
