"""Checkpoints as transformers saves them with bitsandbytes, whose layers make the tensors here: the same weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import SavedCheckpoint, save_checkpoint

import afnext
from afnext.quant.recipe import recipe
from afnext.quant.scheme import NF4
from afnext.runtime.app.quantize import quantize
from afnext.runtime.errors import CheckpointError
from afnext.runtime.model.opened import open_checkpoint
from afnext.runtime.model.parameters import canonical_name

library = pytest.importorskip("bitsandbytes", reason="bitsandbytes makes the tensors")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedCheckpoint:
    encoder = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    decoder = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    return save_checkpoint(
        tmp_path_factory.mktemp("saved"), encoder=encoder, decoder=decoder, partial_rotary_factor=0.25
    )


def packed(kind: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The tensors of a layer by name, as bitsandbytes' own layer saves them, and the weight that it computes with."""
    out, inner = weight.shape
    if kind == "int8":
        layer = library.nn.Linear8bitLt(inner, out, bias=False, has_fp16_weights=False)
        layer.weight = library.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
        layer.to("cpu")
        dense = library.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    else:
        nested = kind == "nf4-nested"
        layer = library.nn.Linear4bit(inner, out, bias=False, quant_type="nf4", compress_statistics=nested)
        data = weight.bfloat16()
        layer.weight = library.nn.Params4bit(data, requires_grad=False, quant_type="nf4", compress_statistics=nested)
        layer.to("cpu")
        layer.weight.quant_state.dtype = torch.float32
        dense = library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}, dense


def write(folder: Path, source: Path, kind: str) -> Tensors:
    """A copy of the checkpoint with all its linear layers but the head packed; return their weights by layer."""
    shutil.copytree(source, folder)
    tensors: Tensors = {}
    expected = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if tensor.ndim == 2 and not any(part in name for part in ("lm_head", "embed_")):
            parts, expected[layer] = packed(kind, tensor)
            tensors |= {f"{layer}.{part}": value for part, value in parts.items()}
        else:
            tensors[name] = tensor
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8"}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8"])
def test_weights_are_those_of_bitsandbytes(kind: str, saved: SavedCheckpoint, tmp_path: Path) -> None:
    expected = write(tmp_path / "source", saved.folder, kind)
    stored = load_file(tmp_path / "source" / "model.safetensors")
    model = afnext.load(tmp_path / "source", dtype="float32")
    assert len(expected) == 6 + 2 + 2 * 7
    for layer, dense in expected.items():
        name = canonical_name(f"{layer}.weight")
        assert name is not None
        module = model.network.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module.packed.codes, torch.Tensor)
        assert torch.equal(module.packed.codes.flatten(), stored[f"{layer}.weight"].flatten())
        if kind == "nf4":
            assert torch.equal(module.packed.scales.flatten(), stored[f"{layer}.weight.absmax"])
        restored = module.scheme.dequantize(module.packed, torch.float32)
        # LLM.int8 rounds twice: code * SCB, and that / 127.
        torch.testing.assert_close(restored, dense, rtol=2e-7 if kind == "int8" else 0, atol=0)
    assert model.network.decoder.lm_head.scheme is None
    assert model.ask(None, "What?", max_new_tokens=2).token_ids


@pytest.fixture(scope="module")
def nested(saved: SavedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in NF4 with nested scales."""
    folder = tmp_path_factory.mktemp("nested") / "source"
    write(folder, saved.folder, "nf4-nested")
    return folder


def test_written_once_for_all(nested: Path, tmp_path: Path) -> None:
    done = quantize(nested, tmp_path / "out", recipe("int8"))
    assert done["recipe"] == "bitsandbytes and int8"
    written, direct = afnext.load(tmp_path / "out").network, afnext.load(nested).network
    assert str(written.decoder.lm_head.scheme) == "int8"
    for name, tensor in direct.decoder.layers.state_dict().items():
        assert torch.equal(tensor, written.decoder.layers.state_dict()[name]), name
    assert isinstance(written.encoder.layers[0].fc1.scheme, NF4)


LAYER = "language_model.model.layers.0.mlp.up_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def restated(**changes: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def changed(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{LAYER}.{name}"] = value(tensors[f"{LAYER}.{name}"])

    return change


def dropped(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[f"{LAYER}.{name}"]

    return change


DAMAGES: dict[str, Callable[[Tensors], None]] = {
    "has no quant_state of nf4": dropped("weight.quant_state.bitsandbytes__nf4"),
    "is not valid JSON": lambda tensors: tensors.update({STATE: torch.zeros(9, dtype=torch.uint8)}),
    "with in divisible by 64": restated(shape=[192, 96]),
    "has the shape 'None'": restated(shape=None),
    "is 'fp4' in blocks of 64": restated(quant_type="fp4"),
    "in blocks of 128": restated(blocksize=128),
    "nested scales without a block size": restated(nested_blocksize=0),
    "and an offset; it is damaged": restated(nested_offset="x"),
    "nested_absmax is F32 .2. where F32 .6.": restated(nested_blocksize=64),
    "U8 \\[12288, 1\\] where U8 \\[24576, 1\\]": restated(shape=[384, 128]),
    "other levels than NF4": changed("weight.quant_map", lambda tensor: tensor * 2),
    "absmax is U8 \\[383\\]": changed("weight.absmax", lambda tensor: tensor[:-1].clone()),
    "nested_quant_map is missing": dropped("weight.nested_quant_map"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_checkpoints_are_refused(message: str, nested: Path, tmp_path: Path) -> None:
    tensors = load_file(nested / "model.safetensors")
    DAMAGES[message](tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copyfile(nested / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "up_proj" in str(caught.value)


def test_a_config_without_such_weights_is_refused(saved: SavedCheckpoint, tmp_path: Path) -> None:
    write(tmp_path / "source", saved.folder, "nf4")
    shutil.copyfile(saved.folder / "model.safetensors", tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no weights in NF4"):
        open_checkpoint(tmp_path / "source")
