"""Checkpoints with layers of 8- and 4-bit floats as compressed-tensors and ModelOpt store them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import afnext

from .logits import last_logits, question

Weights = dict[str, torch.Tensor]
Layer = Callable[[torch.Size], tuple[Weights, torch.Tensor]]


def foreign_checkpoint(
    folder: Path,
    out: Path,
    config: dict[str, Any],
    layer: Layer,
    beside: tuple[str, ...],
    *,
    own_file: bool,
    everywhere: bool = False,
    backbone: bool = False,
) -> tuple[Path, Weights]:
    """The checkpoint in `folder` with random layers: the decoder's, or also those of encoder and lm_head, or a backbone
    alone; and the dense weights that they stand for.

    config: describes the weights, in config.json or in ModelOpt's own file; layer: the tensors of a layer of some
    shape, and its dense weight; beside: unused tensors, those of inputs at every layer, others only at k_proj.
    """
    tensors, dense = Weights(), Weights()
    for key, tensor in load_file(folder / "model.safetensors").items():
        decoder = "language_model.model.layers." in key and key.endswith("proj.weight")
        other = everywhere and tensor.ndim == 2 and key.endswith(("proj.weight", "fc1.weight", "lm_head.weight"))
        if decoder or other:
            parts, dense[key] = layer(tensor.shape)
            parts |= {part: torch.tensor(0.5) for part in beside if part.startswith("input") or "k_proj" in key}
            tensors |= {key.removesuffix("weight") + part: value for part, value in parts.items()}
        elif "language_model." in key or not backbone:
            tensors[key] = tensor
    if backbone:
        tensors = {key.removeprefix("language_model."): tensor for key, tensor in tensors.items()}
    shutil.copytree(folder, out)
    save_file(tensors, out / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    values = values["text_config"] if backbone else values
    if own_file:
        settings = {"producer": {"name": "modelopt"}, "quantization": config}
        (out / "hf_quant_config.json").write_text(json.dumps(settings))
    else:
        values["quantization_config"] = config
    (out / "config.json").write_text(json.dumps(values))
    return out, dense


def rewrite(folder: Path, change: Callable[[Weights, dict[str, Any]], None]) -> None:
    """Change the tensors and the config of the checkpoint in `folder` in place."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def assert_imported(
    ours: afnext.Model, scheme: str, folder: Path, dense: Weights, out: Path, *, rtol: float, atol: float
) -> None:
    """The model has the dense weights, in `scheme`, and computes with them as the one that stores them dense."""
    shutil.copytree(folder, out)
    save_file({**load_file(folder / "model.safetensors"), **dense}, out / "model.safetensors")
    theirs = afnext.load(out, dtype="float32")
    modules = dict(ours.network.named_modules())
    stored = {name: module for name, module in modules.items() if str(getattr(module, "scheme", "")) == scheme}
    assert len(stored) == len(dense)
    for name, module in stored.items():
        assert torch.float8_e4m3fn in (module.packed.codes.dtype, module.packed.scales.dtype)
        weight = module.scheme.dequantize(module.packed, torch.float32)
        assert torch.equal(weight, theirs.network.get_submodule(name).weight), name
    messages = question(np.random.randn(9000).astype(np.float32), "What?")
    torch.testing.assert_close(last_logits(ours, messages), last_logits(theirs, messages), rtol=rtol, atol=atol)
