"""`afnext quantize` on checkpoints with nvfp4 weights of other libraries: the same codes, in a model that answers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.foreign_checkpoint import Weights, assert_imported, foreign_checkpoint, rewrite

import afnext
from afnext.quant.importers import ImportFormatError
from afnext.quant.recipe import recipe
from afnext.runtime.app.quantize import quantize
from afnext.runtime.errors import AfnextError, CheckpointError, ConfigError

E4M3 = torch.float8_e4m3fn
REST = recipe("int4", rules=[("*", "dense")])
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
Change = Callable[[Weights, dict[str, Any]], None]


def compressed(activations: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    inputs = {**weights, "dynamic": "local"} if activations else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": group}}


# How config.json, or ModelOpt's own file, describes the weights; and the tensors beside them.
FORMATS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "compressed-tensors": (compressed(True), ("input_global_scale", "k_scale")),
    "weights only": (compressed(False), ()),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ("input_scale", "k_scale")),
    "modelopt's file": ({"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}, ("input_scale",)),
}


def packed(shape: torch.Size, modelopt: bool) -> tuple[Weights, torch.Tensor]:
    """A random layer as the libraries store it, and the weight that it stands for."""
    out, inner = shape
    magnitudes, signs = torch.randint(0, 8, shape, dtype=torch.uint8), torch.randint(0, 2, shape, dtype=torch.uint8)
    codes = magnitudes | signs << 3
    scales = (448 * torch.rand(out, inner // 16)).to(E4M3)
    factor = 2e-5 * (1 + torch.rand(()))
    stored = {"weight_scale": scales}
    bytes_ = codes[:, 0::2] | codes[:, 1::2] << 4
    if modelopt:
        stored |= {"weight": bytes_, "weight_scale_2": factor}
    else:
        divisor = (1 / factor)[None]
        stored |= {"weight_packed": bytes_, "weight_global_scale": divisor}
        factor = 1 / divisor[0]
    levels = LEVELS[magnitudes.long()] * (1 - 2 * signs.float())
    return stored, levels * scales.float().repeat_interleave(16, 1) * factor


def foreign(folder: Path, out: Path, name: str, **layers: bool) -> tuple[Path, Weights]:
    """See `foreign_checkpoint`."""
    config, beside = FORMATS[name]
    layer = partial(packed, modelopt="modelopt" in name)
    return foreign_checkpoint(folder, out, config, layer, beside, own_file=name == "modelopt's file", **layers)


def assert_alike(ours: afnext.Model, *where: Any) -> None:
    """The weights are equal up to the order of two factors, and so are the results."""
    assert_imported(ours, "nvfp4", *where, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_an_imported_model_is_the_dense_one_that_it_stands_for(
    folder: Path, tmp_path: Path, name: str, seed: int
) -> None:
    source, dense = foreign(folder, tmp_path / "source", name)
    done = quantize(source, tmp_path / "out", REST)
    assert done["rules"][0] == ["decoder.layers.*", "nvfp4"]
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert_alike(afnext.load(tmp_path / "out", dtype="float32"), folder, dense, tmp_path / "dense")


def test_every_matrix_may_be_imported_and_a_backbone_alone(folder: Path, tmp_path: Path, seed: int) -> None:
    source, dense = foreign(folder, tmp_path / "everywhere", "compressed-tensors", everywhere=True)
    quantize(source, tmp_path / "out", REST)
    assert_alike(afnext.load(tmp_path / "out", dtype="float32"), folder, dense, tmp_path / "dense")
    source, dense = foreign(folder, tmp_path / "backbone", "modelopt", backbone=True)
    quantize(folder, tmp_path / "joined", REST, backbone=source)
    assert_alike(afnext.load(tmp_path / "joined", dtype="float32"), folder, dense, tmp_path / "dense2")


def named(tensors: Weights, part: str) -> str:
    return next(name for name in tensors if name.endswith(f"layers.0.mlp.up_proj.{part}"))


def changed(part: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: Weights, config: dict[str, Any]) -> None:
        tensors[named(tensors, part)] = value(tensors[named(tensors, part)])

    return change


def dropped(part: str) -> Change:
    return lambda tensors, config: tensors.__delitem__(named(tensors, part))


def nan_scale(tensors: Weights, config: dict[str, Any]) -> None:
    tensors[named(tensors, "weight_scale")].view(torch.uint8)[3, 4] = 255


def pre_scaled(tensors: Weights, config: dict[str, Any]) -> None:
    tensors[named(tensors, "weight_packed").replace("weight_packed", "pre_quant_scale")] = torch.ones(96)


def larger_groups(tensors: Weights, config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 32


def larger_blocks(tensors: Weights, config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}


def mxfp4(tensors: Weights, config: dict[str, Any]) -> None:
    config["quantization_config"]["format"] = "mxfp4-pack-quantized"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dropped("weight_global_scale"), CheckpointError, "up_proj"),
        (dropped("weight_scale"), ImportFormatError, "up_proj of a compressed-tensors checkpoint lacks"),
        (changed("weight_scale", lambda t: t[:, :2].contiguous()), ImportFormatError, r"\[192, 2\]"),
        (changed("weight_scale", torch.Tensor.float), ImportFormatError, "up_proj.weight_scale is torch.float32"),
        (changed("weight_packed", torch.Tensor.char), ImportFormatError, "up_proj.weight_packed is torch.int8"),
        (changed("weight_global_scale", lambda t: t.expand(2).contiguous()), ImportFormatError, "not one float32"),
        (changed("weight_global_scale", torch.zeros_like), ImportFormatError, "up_proj has scales that are not finite"),
        (nan_scale, ImportFormatError, "up_proj has scales that are not finite"),
        (pre_scaled, CheckpointError, "pre_quant_scale"),
        (larger_groups, ImportFormatError, "group_size 16"),
        (larger_blocks, ImportFormatError, "not of 32"),
        (mxfp4, ImportFormatError, "mxfp4-pack-quantized"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(
    folder: Path, tmp_path: Path, change: Change, error: type[AfnextError], message: str, seed: int
) -> None:
    source, _ = foreign(folder, tmp_path / "source", "compressed-tensors")
    rewrite(source, change)
    with pytest.raises(error, match=message):
        quantize(source, tmp_path / "out", REST)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("name", ["compressed-tensors", "modelopt", "modelopt's file"])
def test_loading_it_says_how_to_import_it(folder: Path, tmp_path: Path, name: str) -> None:
    source, _ = foreign(folder, tmp_path / "source", name)
    with pytest.raises(ConfigError, match="afnext quantize"):
        afnext.load(source)
