"""The header check against files that the safetensors library writes, and against lying ones."""

import json
import mmap
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from afnext.runtime.errors import CheckpointError
from afnext.runtime.model.safetensors_header import StoredTensor, parse_header


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header and data; `length` is the header length that it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


VALID = pack({"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}, bytes(32))


def test_reads_what_safetensors_writes(seed: int) -> None:
    rng = random.Random(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]
    tensors = {
        f"t{index}": torch.zeros([rng.randint(0, 5) for _ in range(rng.randint(0, 4))], dtype=rng.choice(dtypes))
        for index in range(30)
    }
    data = save(tensors, metadata={"format": "pt"})
    header = parse_header(data, "model.safetensors")
    assert {name: stored.shape for name, stored in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {n: stored.end - stored.start for n, stored in header.items()} == {n: t.nbytes for n, t in tensors.items()}
    assert max(stored.end for stored in header.values()) == len(data)


def test_more_tensors_than_any_model_has_are_refused() -> None:
    empty = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    many = b"{" + b",".join(empty % index for index in range(40_000)) + b"}"
    with pytest.raises(CheckpointError, match=r"m has 40,000 tensors; at most 32,768"):
        parse_header(pack(many), "m")
    with pytest.raises(CheckpointError, match="claims a header of"):
        parse_header(pack(many.ljust(17 << 20)), "m")


def test_offsets_are_positions_in_the_file() -> None:
    header = parse_header(VALID, "m")
    start = len(VALID) - 32
    assert header["b"] == StoredTensor("BF16", (4,), start + 24, start + 32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is truncated: 0 bytes"),
        (VALID[:7], "is truncated: 7 bytes"),
        (VALID[:40], "is truncated: 40 bytes"),
        (VALID[:-1], "tensor 'b' ends beyond the file"),
        (VALID[:-20], "tensor 'a' ends beyond the file"),
        (VALID + b"x", "has 1 bytes that belong to no tensor"),
        (pack(b"{}", bytes(10), length=1 << 63), "is truncated"),
        (pack(b"{} ", length=2), "has 1 bytes that belong to no tensor"),
        (pack(b"{]"), "(its header) is not valid JSON"),
        (pack(b"\xff\xff"), "(its header) is not valid JSON"),
        (pack(b"[" * 100_000), "(its header) is not valid JSON"),
        (pack([1]), "holds a JSON list, not an object"),
        (pack(b'{"a": 1, "a": 1}'), "the key 'a' occurs twice"),
        (
            pack(b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
            "the key 'dtype' occurs",
        ),
        (pack({"__metadata__": {"a": 1}}), "__metadata__ must map strings to strings"),
        (pack({"a": 1}), "tensor 'a' must have exactly dtype, shape and data_offsets"),
        (pack({"a": {"dtype": "U8", "shape": [1]}}), "tensor 'a' must have exactly"),
        (pack({"a": entry("Q4", [1], 0, 1)}, bytes(1)), "tensor 'a' has the unknown dtype 'Q4'"),
        (pack({"a": entry(["F32"], [1], 0, 4)}, bytes(4)), "tensor 'a' has the unknown dtype a list"),
        (pack({"a": entry("U8", [-1, -1], 0, 1)}, bytes(1)), "tensor 'a' has a shape that is not a list"),
        (pack({"a": entry("U8", [True], 0, 1)}, bytes(1)), "tensor 'a' has a shape that is not a list"),
        (pack({"a": entry("U8", [1.0], 0, 1)}, bytes(1)), "tensor 'a' has a shape that is not a list"),
        (pack({"a": entry("U8", [1] * 65, 0, 1)}, bytes(1)), "tensor 'a' has a shape that is not a list of at most 64"),
        (pack({"a": entry("U8", [1 << 32, 1 << 32], 0, 0)}), "tensor 'a' has a shape with more than 2**63 elements"),
        (pack({"a": entry("U8", [1 << 62, 4, 0], 0, 0)}), "tensor 'a' has a shape with more than 2**63 elements"),
        (pack({"a": entry("U8", [1], 0)}, bytes(1)), "tensor 'a' has data_offsets that are not two rising"),
        (pack({"a": entry("U8", [1], 1, 0)}, bytes(1)), "tensor 'a' has data_offsets that are not two rising"),
        (pack({"a": entry("U8", [1], -1, 0)}, bytes(1)), "tensor 'a' has data_offsets that are not two rising"),
        (
            pack({"a": entry("F32", [3], 0, 11)}, bytes(11)),
            "tensor 'a' has shape [3] in F32, but its data_offsets span 11",
        ),
        (pack({"a": entry("F4", [3], 0, 1)}, bytes(1)), "tensor 'a' has shape [3] in F4, but"),
        (pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, bytes(3)), "tensor 'b' overlaps"),
        (pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, bytes(5)), "tensor 'b' leaves a hole"),
        (pack({"a": entry("U8", [2], 1, 3)}, bytes(3)), "tensor 'a' leaves a hole"),
        (pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, bytes(2)), "tensor 'b' overlaps"),
        (pack({"a": entry("U8", [9], 0, 9)}, bytes(8)), "tensor 'a' ends beyond the file"),
    ],
)
def test_lies_are_named(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_header(data, "model-00001.safetensors")
    assert str(caught.value).startswith("model-00001.safetensors")
    assert message in str(caught.value)


def test_header_length_is_capped(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(200_000_100)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with mapped, pytest.raises(CheckpointError, match="claims a header of 200,000,000 bytes"):
        parse_header(mapped, "sparse.safetensors")


def test_hostile_names_do_not_flood_the_message() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_header(pack({"\x1b[2J\ud800" * 10_000: 1}), "m")
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)


def is_sound(header: dict[str, StoredTensor], size: int) -> bool:
    spans = sorted((stored.start, stored.end) for stored in header.values())
    inside = all(0 <= start <= end <= size for start, end in spans)
    return inside and all(first[1] == second[0] for first, second in pairwise(spans))


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 40)
)
def test_changed_bytes_are_sound_or_refused(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    data = data[: len(data) - cut]
    try:
        header = parse_header(bytes(data), "m")
    except CheckpointError:
        return
    assert is_sound(header, len(data))


NUMBERS = st.integers(-2, 40) | st.sampled_from([1 << 31, 1 << 63, 1 << 64, True, None, 1.5, "1"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "BOOL", "X", None, 3]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | NUMBERS,
    }
)


@settings(max_examples=400)
@given(st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), st.integers(0, 48))
def test_forged_headers_are_sound_or_refused(header: dict[str, Any], size: int) -> None:
    data = pack(header, bytes(size))
    try:
        parsed = parse_header(data, "m")
    except CheckpointError:
        return
    assert is_sound(parsed, len(data))
    assert sum(stored.end - stored.start for stored in parsed.values()) == size
