"""Quantizing while loading: the model that results, what is refused, and which tensors stand for its weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import relative_rms
from support.logits import last_logits, question

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.quant.linear import Embedding, Linear
from afnext.quant.recipe import recipe
from afnext.quant.scheme import SchemeError, parse_scheme
from afnext.runtime.errors import CheckpointError, ConfigError
from afnext.runtime.model.checkpoint import Checkpoint, check_fit
from afnext.runtime.model.config import ModelConfig
from afnext.runtime.model.parameters import expected_shapes
from afnext.runtime.model.quantized import (
    check_written_for,
    expected_tensors,
    layer_schemes,
    quantization_metadata,
    to_quantize,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("dense"))


def audio() -> np.ndarray:
    return np.random.randn(20_000).astype(np.float32) / 10


@pytest.mark.parametrize("quant", ["int8", "int8-w8a8", "fp8", "nvfp4", "int4-g32", "int4-g32-zeros", "int4-g32-w4a8"])
def test_the_model_computes_with_the_rounded_weights(folder: Path, quant: str, seed: int) -> None:
    model = afnext.load(folder, dtype="float32", quant=quant)
    rounded = afnext.load(folder, dtype="float32")
    stored = recipe(quant)
    layers = {
        name: module for name, module in rounded.network.named_modules() if isinstance(module, Linear | Embedding)
    }
    schemes = {name: stored.scheme(name) for name in layers}
    for name, layer in layers.items():
        scheme = schemes[name]
        if scheme is not None and name != "encoder.embed_positions":
            layer.register_buffer("weight", scheme.dequantize(scheme.quantize(layer.weight), torch.float32))
    assert "int4" not in quant or any(isinstance(scheme, type(parse_scheme("int4"))) for scheme in schemes.values())
    messages = question(audio(), "What?")
    bound = 0.2 if quant == "fp8" else 0.05 if quant.endswith("a8") else 1e-4
    assert relative_rms(last_logits(model, messages), last_logits(rounded, messages)) < bound
    assert relative_rms(last_logits(rounded, messages), last_logits(afnext.load(folder, dtype="float32"), messages)) > 0


def test_what_is_held_is_smaller(folder: Path) -> None:
    def nbytes(model: afnext.Model) -> int:
        return sum(buffer.nbytes for buffer in model.network.buffers())

    dense, eight, four = (nbytes(afnext.load(folder, quant=quant)) for quant in (None, "int8", "int4-g32"))
    assert four < eight < dense


def test_a_group_that_does_not_divide_is_an_error_that_names_the_layer(folder: Path) -> None:
    with pytest.raises(SchemeError, match=r"decoder\.layers\.0\.self_attn\.q_proj cannot be int4-g64: 96 inputs"):
        afnext.load(folder, quant="int4")
    with pytest.raises(SchemeError, match="unknown recipe 'int7'"):
        afnext.load(folder, quant="int7")


def test_weights_that_are_not_finite_are_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    checkpoint = Checkpoint.open(folder)
    entry = checkpoint._parameter("decoder.layers.1.mlp.up_proj.weight")._stored
    del checkpoint
    data[entry.start : entry.start + 2] = b"\x80\x7f"  # infinity in bfloat16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*1 of 18432 weights are not finite"):
        afnext.load(folder, quant="int8")


def test_tensors_of_a_quantized_model(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    quantized = replace(config, quantization=recipe("int4-g32-zeros"))
    dense, packed = expected_shapes(config), expected_tensors(quantized)
    layers = layer_schemes(quantized)
    assert "encoder.embed_positions" not in layers
    assert "encoder.layers.0.self_attn_layer_norm" not in layers
    assert {f"{layer}.weight" for layer in layers} <= dense.keys()
    assert packed.keys() - dense.keys() == {
        f"{layer}.weight_{part}"
        for layer, scheme in layers.items()
        for part in ("codes", "scales", *(("zeros",) if "zeros" in str(scheme) else ()))
    }
    assert expected_tensors(config).keys() == dense.keys()


def test_a_quantized_checkpoint_is_not_quantized_otherwise(folder: Path) -> None:
    dense = ModelConfig.from_folder(folder)
    stored = replace(dense, quantization=recipe("int8"))
    assert to_quantize(stored, recipe("int8")) == to_quantize(stored, None) == stored
    assert to_quantize(dense, recipe("int8")) == stored
    with pytest.raises(ConfigError, match="quantized already"):
        to_quantize(stored, recipe("int4"))


def test_files_and_config_have_to_tell_the_same(folder: Path) -> None:
    dense = ModelConfig.from_folder(folder)
    eight = replace(recipe("int8"), source="a" * 64)
    stored = replace(dense, quantization=eight)
    check_written_for(dense, {"model.safetensors": {"format": "pt"}}, folder)
    check_written_for(stored, {"model.safetensors": quantization_metadata(eight)}, folder)
    contradictions = [
        (dense, quantization_metadata(eight), "int8 from aaaaaaaaaaaa, but its config.json describes dense weights"),
        (stored, {}, "dense weights, but its config.json describes weights quantized by int8"),
        (stored, quantization_metadata(recipe("int4")), "quantized by int4"),
        (stored, quantization_metadata(replace(eight, source="b" * 64)), "from bbbbbbbbbbbb, but"),
        (stored, {"afnext.quantization": "[1"}, "cannot be read"),
        (stored, {"afnext.quantization": '{"quant_method": "afnext", "version": 9}'}, "version 9"),
    ]
    for config, metadata, message in contradictions:
        with pytest.raises(CheckpointError, match=message):
            check_written_for(config, {"model.safetensors": metadata}, folder)


def test_a_config_that_tells_of_packed_weights_refuses_dense_ones(folder: Path) -> None:
    stored = replace(ModelConfig.from_folder(folder), quantization=recipe("int8"))
    with pytest.raises(CheckpointError, match=r"holds dense weights, but its config\.json"):
        check_fit(Checkpoint.open(folder), stored)
