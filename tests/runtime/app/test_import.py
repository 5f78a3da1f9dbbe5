"""`afnext quantize` on checkpoints of other libraries: the same bits, in a model that answers, or an error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import CommandLine
from support.foreign import configs, example, stored_as
from support.foreign_checkpoint import Weights, rewrite
from support.logits import last_logits, question

import afnext
from afnext.quant.importers import ImportFormatError
from afnext.quant.recipe import recipe
from afnext.runtime.app.quantize import quantize
from afnext.runtime.errors import AfnextError, CheckpointError, ConfigError

METHODS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
REST = recipe("int4", rules=[("*", "dense")])


def packed(method: str, out: int, inputs: int, symmetric: bool) -> tuple[Weights, torch.Tensor]:
    """A random layer as the library stores it, and the weight that it stands for."""
    codes, scales, zeros = example(out, inputs, 32, symmetric)
    scales = (scales / 100).astype(np.float16)
    tensors = stored_as(method, codes, scales, zeros, symmetric)
    weight = (codes - zeros.repeat(32, 1)) * scales.astype(np.float64).repeat(32, 1)
    return tensors, torch.from_numpy(weight).float()


def foreign(
    folder: Path, out: Path, method: str, *, symmetric: bool = False, backbone: bool = False
) -> tuple[Path, Weights]:
    """The checkpoint in `folder` with random decoder layers in another library's format, whole or its backbone alone;
    and the dense weights that these stand for."""
    stored = load_file(folder / "model.safetensors")
    tensors, dense = Weights(), Weights()
    for name, tensor in stored.items():
        inside = "language_model.model.layers." in name and name.endswith("proj.weight")
        if inside:
            parts, dense[name] = packed(method, *tensor.shape, symmetric)
            tensors |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
        elif "language_model." in name or not backbone:
            tensors[name] = tensor
    if backbone:
        tensors = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config = config["text_config"] if backbone else config
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": configs(32)[method]}))
    if not backbone:
        for path in folder.glob("*"):
            if path.name not in ("config.json", "model.safetensors"):
                shutil.copy(path, out)
    return out, dense


def as_dense(folder: Path, out: Path, weights: Weights) -> Path:
    """The checkpoint with these weights in place of its own."""
    shutil.copytree(folder, out)
    save_file({**load_file(folder / "model.safetensors"), **weights}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("backbone", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_an_imported_model_is_the_dense_one_that_it_stands_for(
    folder: Path, tmp_path: Path, method: str, symmetric: bool, backbone: bool, seed: int
) -> None:
    source, dense = foreign(folder, tmp_path / "source", method, symmetric=symmetric, backbone=backbone)
    out = tmp_path / "out"
    done = quantize(folder, out, REST, backbone=source) if backbone else quantize(source, out, REST)
    assert done["rules"][0] == ["decoder.layers.*", "int4-g32" if symmetric else "int4-g32-zeros"]
    imported = afnext.load(out, dtype="float32")
    expected = afnext.load(as_dense(folder, tmp_path / "dense", dense), dtype="float32")
    layers, wanted = imported.network.decoder.layers, expected.network.decoder.layers
    for ours, theirs in zip(layers, wanted, strict=True):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            module = ours.get_submodule(name)
            weight = module.scheme.dequantize(module.packed, torch.float32)
            assert torch.equal(weight, theirs.get_submodule(name).weight), name
    messages = question(np.random.randn(9000).astype(np.float32), "What?")
    torch.testing.assert_close(last_logits(imported, messages), last_logits(expected, messages), rtol=1e-3, atol=1e-3)


def test_the_rest_is_packed_by_the_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    run = CommandLine(monkeypatch, capsys)
    source, _ = foreign(folder, tmp_path / "source", "awq", backbone=True)
    done = json.loads(run("quantize", folder, tmp_path / "out", "--backbone", source, "--json").stdout)
    described = json.loads(run("info", tmp_path / "out", "--json").stdout)
    assert described["bytes"] == done["bytes"]
    assert described["schemes_by_part"]["decoder layers"] == ["int4-g32-zeros"]
    assert described["schemes_by_part"]["lm_head"] == ["int8"]
    assert described["quantization"]["source"] == done["source_hash"]


def remove(name: str) -> Callable[[Weights, dict[str, Any]], None]:
    def change(tensors: Weights, config: dict[str, Any]) -> None:
        del tensors[next(each for each in tensors if each.endswith(name))]

    return change


def unknown_head(tensors: Weights, config: dict[str, Any]) -> None:
    tensors["lm_head.qweight"] = torch.zeros(8, 8, dtype=torch.int32)


def narrow(tensors: Weights, config: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith("layers.0.mlp.up_proj.qweight")]:
        tensors[name] = tensors[name][:, :-1].contiguous()


def eight_bits(tensors: Weights, config: dict[str, Any]) -> None:
    config["quantization_config"]["bits"] = 8


def no_layers(tensors: Weights, config: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (remove("mlp.up_proj.qzeros"), ImportFormatError, "qzeros"),
        (remove("mlp.up_proj.qweight"), CheckpointError, "up_proj"),
        (remove("embed_tokens.weight"), CheckpointError, "embed_tokens"),
        (unknown_head, CheckpointError, "lm_head"),
        (narrow, AfnextError, "layers.0.mlp.up_proj"),
        (eight_bits, ImportFormatError, "says bits"),
        (no_layers, ImportFormatError, "no layer"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(
    folder: Path,
    tmp_path: Path,
    change: Callable[[Weights, dict[str, Any]], None],
    error: type[AfnextError],
    named: str,
) -> None:
    source, _ = foreign(folder, tmp_path / "source", "gptq")
    rewrite(source, change)
    with pytest.raises(error, match=named):
        quantize(source, tmp_path / "out", REST)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("lost", ["layers.0.input_layernorm.weight", "layers.0.mlp.up_proj", "embed_tokens.weight"])
def test_half_a_backbone_is_not_filled_up(folder: Path, tmp_path: Path, lost: str) -> None:
    source, _ = foreign(folder, tmp_path / "source", "awq", backbone=True)
    tensors = load_file(source / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if lost not in name}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=lost):
        quantize(folder, tmp_path / "out", REST, backbone=source)


def test_a_backbone_alone_needs_the_rest(folder: Path, tmp_path: Path) -> None:
    source, _ = foreign(folder, tmp_path / "source", "gptq", backbone=True)
    with pytest.raises(ConfigError, match="backbone alone"):
        quantize(source, tmp_path / "out", REST)


def test_loading_it_says_how_to_import_it(folder: Path, tmp_path: Path) -> None:
    source, _ = foreign(folder, tmp_path / "source", "awq")
    with pytest.raises(ConfigError, match="afnext quantize"):
        afnext.load(source)
