"""The writer of safetensors files, against the library that defines the format."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from afnext.quant.convert import INDEX_FILE, CheckpointWriter
from afnext.quant.scheme import Stored

DTYPES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)


def stored(tensors: dict[str, torch.Tensor]) -> dict[str, Stored]:
    return {name: Stored(tuple(tensor.shape), (tensor.dtype,)) for name, tensor in tensors.items()}


def random_tensor(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 100, shape).to(dtype)


@settings(max_examples=30)
@given(
    kinds=st.lists(
        st.tuples(st.lists(st.integers(1, 5), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=12
    ),
    shard_bytes=st.integers(1, 300),
    order=st.randoms(use_true_random=False),
)
def test_what_is_written_is_read_by_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[tuple[list[int], torch.dtype]],
    shard_bytes: int,
    order: random.Random,
) -> None:
    folder = tmp_path_factory.mktemp("written")
    tensors = {f"t{index}": random_tensor(shape, dtype) for index, (shape, dtype) in enumerate(kinds)}
    writer = CheckpointWriter(folder, stored(tensors), {"note": "????????????????"}, shard_bytes)
    names = list(tensors)
    order.shuffle(names)
    for name in names:
        writer.write(name, tensors[name])
    files = writer.finish({"note": '\u00e4"'})
    read: dict[str, torch.Tensor] = {}
    for file in files:
        assert file.stat().st_size <= 16_000
        part = load_file(file)
        assert not read.keys() & part.keys()
        read |= part
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "note": '\u00e4"'}
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= shard_bytes
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
    if len(files) > 1:
        index = json.loads((folder / INDEX_FILE).read_text())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert sorted(os.listdir(folder)) == sorted([file.name for file in files] + [INDEX_FILE] * (len(files) > 1))


def test_codes_are_aligned(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, dtype=torch.bfloat16),
        "b": torch.zeros(5, dtype=torch.float32),
        "codes": torch.zeros(2, 16, dtype=torch.uint8),
        "more": torch.zeros(1, 32, dtype=torch.int8),
    }
    writer = CheckpointWriter(tmp_path, stored(tensors), {})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    data = writer.finish({})[0].read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, size in (("codes", 16), ("more", 16), ("b", 4), ("a", 2)):
        assert (8 + length + header[name]["data_offsets"][0]) % size == 0


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {"x": Stored((2, 3), (torch.float32,))}, {"a": "b"})
    for name, tensor in (("y", torch.zeros(2, 3)), ("x", torch.zeros(3, 2))):
        with pytest.raises(ValueError, match="does not belong"):
            writer.write(name, tensor)
    writer = CheckpointWriter(tmp_path, {"x": Stored((2, 3), (torch.float32,))}, {"a": "b"})
    with pytest.raises(ValueError, match="does not belong"):
        writer.write("x", torch.zeros(2, 3, dtype=torch.float16))
    writer = CheckpointWriter(tmp_path, {"x": Stored((1,), (torch.float32,))}, {"a": "b"})
    with pytest.raises(ValueError, match="1 tensors were not written, the first is x"):
        writer.finish({})
    writer.write("x", torch.zeros(1))
    with pytest.raises(ValueError, match="does not belong"):
        writer.write("x", torch.zeros(1))
    with pytest.raises(ValueError, match="longer"):
        writer.finish({"a": "b" * 1000})
    assert not list(tmp_path.glob("*.safetensors"))
