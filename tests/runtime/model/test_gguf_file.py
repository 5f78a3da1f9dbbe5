"""The GGUF reader against files that the package `gguf` writes, and against lying ones."""

import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.runtime.errors import CheckpointError
from afnext.runtime.model.gguf_file import GgufFile, GgufTensor, parse_gguf_header

gguf = pytest.importorskip("gguf", reason="GGUF files are written with the package gguf")

KNOWN = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
U8, I8, U32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def tensor(name: str | bytes, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    """An entry of the table; sizes innermost first."""
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file(
    values: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A GGUF file, aligned to 32; counts: of tensors and values as the header claims them."""
    head = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(values))))
    head += b"".join(values) + b"".join(tensors)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


VALID = file(
    (text("general.name") + struct.pack("<I", STRING) + text("x"),),
    (tensor("a", (4, 2), 0, 0), tensor("b", (32,), 2, 32)),
    bytes(64),
)


def write(path: Path, rng: random.Random) -> dict[str, np.ndarray]:
    """A file by the package `gguf` with values of every type, and the tensors that went into it."""
    writer = gguf.GGUFWriter(path, "test")
    writer.add_custom_alignment(rng.choice((32, 64, 256)))
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint64("u64", 2**63)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Grüße")
    writer.add_array("words", ["a", "", "ſound"])
    writer.add_array("numbers", [3, -4])
    writer.add_key_value("bytes", list(range(256)), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)
    arrays = {}
    for index in range(rng.randint(1, 20)):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4)))
        arrays[f"t{index}"] = np.random.default_rng(rng.randrange(1 << 32)).random(shape, np.float32)
        writer.add_tensor(f"t{index}", arrays[f"t{index}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def test_reads_what_the_package_gguf_writes(tmp_path: Path, seed: int) -> None:
    arrays = write(tmp_path / "a.gguf", random.Random(seed))
    read = GgufFile(tmp_path / "a.gguf")
    values = read.metadata
    assert (values["u8"], values["i8"], values["u64"], values["f32"]) == (200, -100, 2**63, 0.5)
    assert (values["f64"], values["yes"], values["text"], values["words"]) == (0.1, True, "Grüße", ["a", "", "ſound"])
    assert values["numbers"].tolist() == [3, -4]
    assert bytes(values["bytes"]) == bytes(range(256))
    assert read.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        stored = read.tensors[name]
        assert (stored.kind, stored.shape) == ("F32", array.shape)
        assert read.mapped.map[stored.start : stored.end] == array.tobytes()


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType)
def test_sizes_of_blocks_are_those_of_the_package_gguf(kind: Any) -> None:
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = file((), (tensor("x", (weights, 3), kind, 0),), bytes(3 * nbytes))
    if kind.name not in KNOWN:
        with pytest.raises(CheckpointError, match=f"type number {int(kind)}, which"):
            parse_gguf_header(data, "m")
        return
    stored = parse_gguf_header(data, "m").tensors["x"]
    assert (stored.kind, stored.end - stored.start) == (kind.name, 3 * nbytes)


def test_offsets_are_positions_in_the_file() -> None:
    start = len(VALID) - 64
    assert parse_gguf_header(VALID, "m").tensors == {
        "a": GgufTensor("F32", (2, 4), start, start + 32),
        "b": GgufTensor("Q4_0", (32,), start + 32, start + 50),
    }


def value(key: str, kind: int, *rest: Any) -> bytes:
    return text(key) + struct.pack("<I", kind) + b"".join(r if isinstance(r, bytes) else bytes([r]) for r in rest)


ONE = tensor("a", (8,), 0, 0)
LYING = {
    "not a GGUF file": b"GGML" + VALID[4:],
    "GGUF version 1;": file(version=1),
    "big-endian": file(version=3 << 24),
    "claims 32,769 tensors": file(counts=(32_769, 0)),
    "4,097 metadata values": file(counts=(0, 4097)),
    "truncated": VALID[:70],
    "a metadata key has 18,446,744,073,709,551,615 bytes": file((struct.pack("<Q", 2**64 - 1),)),
    "a metadata key is not UTF-8": file((value("k", U8, 1).replace(b"k", b"\xff"),)),
    "'k' occurs twice": file((value("k", U8, 1), value("k", U8, 1))),
    "'k' has the type 13": file((value("k", 13, 0),)),
    "'k' is 2 where a truth value": file((value("k", BOOL, 2),)),
    "an array of arrays": file((value("k", ARRAY, struct.pack("<IQ", ARRAY, 1)),)),
    "'k' has 1,048,577 items": file((value("k", ARRAY, struct.pack("<IQ", STRING, 1_048_577)),)),
    "'k' has 4,611,686,018,427,387,904 numbers": file((value("k", ARRAY, struct.pack("<IQ", U32, 2**62)),)),
    "general.alignment is 24": file((value("general.alignment", U32, struct.pack("<I", 24)),)),
    "general.alignment is 131072": file((value("general.alignment", U32, struct.pack("<I", 1 << 17)),)),
    "general.alignment is 'x'": file((value("general.alignment", STRING, text("x")),)),
    "tensor 'a' occurs twice": file((), (ONE, tensor("a", (8,), 0, 32)), bytes(64)),
    "a tensor's name has 257 bytes": file((), (tensor("a" * 257, (8,), 0, 0),), bytes(32)),
    "5 dimensions": file((), (tensor("a", (1,) * 5, 0, 0),), bytes(4)),
    "impossible shape [0, 8]": file((), (tensor("a", (8, 0), 0, 0),)),
    "impossible shape [4294967296": file((), (tensor("a", (2**32, 2**32), 0, 0),)),
    "type number 20, which": file((), (tensor("a", (32,), 20, 0),), bytes(32)),
    "not whole blocks of Q4_K": file((), (tensor("a", (128, 2), 12, 0),), bytes(144)),
    "not aligned to 32 bytes": file((), (tensor("a", (4,), 0, 16),), bytes(32)),
    "'a' ends beyond the file": file((), (ONE,), bytes(31)),
    "'b' overlaps": file((), (ONE, tensor("b", (8,), 0, 0)), bytes(64)),
    "'b' leaves a hole": file((), (ONE, tensor("b", (8,), 0, 64)), bytes(96)),
    "32 bytes that belong to no tensor": file((), (ONE,), bytes(64)),
}


@pytest.mark.parametrize("message", LYING)
def test_lying_files_are_refused(message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_gguf_header(LYING[message], "m.gguf")
    assert message in str(caught.value)
    assert "m.gguf" in str(caught.value)


@given(st.data())
@settings(max_examples=300)
def test_mutated_files_are_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from([0, 1, 7, 8, 9, 32, 127, 128, 255]))
    cut = bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, len(content) - 1]))])
    try:
        header = parse_gguf_header(cut, "m")
    except CheckpointError:
        return
    for stored in header.tensors.values():
        assert 0 <= stored.start <= stored.end <= len(cut)


def test_a_forged_count_costs_no_memory() -> None:
    """Each claim is checked against the file before anything is made by it."""

    class Counting(io.BytesIO):
        def __len__(self) -> int:
            return len(self.getvalue())

        def __getitem__(self, index: slice) -> bytes:
            assert index.stop - index.start < 1 << 20
            return self.getvalue()[index]

    array = value("k", ARRAY, struct.pack("<IQ", U8, 1 << 27))
    with pytest.raises(CheckpointError, match="truncated"):
        parse_gguf_header(Counting(file((array,))), "m")


@pytest.mark.parametrize("kind", ["folder", "empty", "missing"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    with pytest.raises(CheckpointError, match=r"a\.gguf cannot be"):
        GgufFile(path)
