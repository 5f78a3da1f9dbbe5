"""The reader of CTranslate2 model files, and the split of fused weights."""

import struct
from pathlib import Path

import numpy as np
import pytest

from afnext.bench.quality.whisper import encoder_weights, read_tensors

CODES = {np.dtype(np.float32): 0, np.dtype(np.float16): 4}


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<I", 3) + struct.pack("<I", len(tensors))
    for name, value in tensors.items():
        data += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        data += struct.pack("<BI", CODES[value.dtype], value.nbytes) + value.tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_tensors_come_back(tmp_path: Path, seed: int, dtype: type) -> None:
    tensors = {"a/b": np.random.randn(3, 5).astype(dtype), "c": np.random.randn(7).astype(dtype)}
    write(tmp_path / "model.bin", tensors)
    read = read_tensors(tmp_path / "model.bin")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value)


def test_queries_keys_and_values_are_cut_apart(tmp_path: Path, seed: int) -> None:
    width, layer, attention = 4, "encoder/layer_0/", "encoder/layer_0/self_attention/"
    shapes: dict[str, tuple[int, ...]] = {"encoder/position_encodings/encodings": (6, width)}
    for name in ("conv1", "conv2"):
        shapes |= {f"encoder/{name}/weight": (width, 2, 3), f"encoder/{name}/bias": (width,)}
    shapes |= {f"{attention}linear_0/weight": (3 * width, width), f"{attention}linear_0/bias": (3 * width,)}
    for name in (f"{attention}linear_1", f"{layer}ffn/linear_0", f"{layer}ffn/linear_1"):
        shapes |= {f"{name}/weight": (width, width), f"{name}/bias": (width,)}
    for name in (f"{attention}layer_norm", f"{layer}ffn/layer_norm"):
        shapes |= {f"{name}/gamma": (width,), f"{name}/beta": (width,)}
    tensors = {name: np.random.randn(*shape).astype(np.float32) for name, shape in shapes.items()}
    write(tmp_path / "model.bin", tensors)
    weights = encoder_weights(tmp_path / "model.bin", 1)
    fused = tensors[f"{attention}linear_0/weight"]
    for i, name in enumerate("qkv"):
        np.testing.assert_array_equal(weights[f"layers.0.self_attn.{name}_proj.weight"], fused[4 * i : 4 * i + 4])
    assert "layers.0.self_attn.k_proj.bias" not in weights
    np.testing.assert_array_equal(weights["layers.0.final_layer_norm.bias"], tensors[f"{layer}ffn/layer_norm/beta"])
    np.testing.assert_array_equal(weights["layers.0.fc2.weight"], tensors[f"{layer}ffn/linear_1/weight"])
