"""`afnext quantize` on checkpoints with e4m3 weights of other libraries: the same codes, in a model that answers."""

from collections.abc import Callable
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


def compressed(strategy: str, activations: dict[str, Any] | None) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
# How config.json, or ModelOpt's own file, describes the weights; the shape of a layer's scales, for `out` outputs; and
# the tensors beside them.
FORMATS: dict[str, tuple[dict[str, Any], Callable[[int], tuple[int, ...]], tuple[str, ...]]] = {
    "dynamic": (compressed("channel", TOKEN), lambda out: (out, 1), ()),
    "static": (compressed("tensor", STATIC), lambda out: (1,), ("input_scale",)),
    "weights only": (compressed("tensor", None), lambda out: (), ()),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, lambda out: (), ("input_scale", "k_scale")),
    "modelopt, channels": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        lambda out: (out,),
        (),
    ),
    "modelopt's file": ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, lambda out: (), ("input_scale",)),
}


def packed(shape: torch.Size, scales: tuple[int, ...], dtype: torch.dtype) -> tuple[Weights, torch.Tensor]:
    """A random layer as the libraries store it, and the weight that it stands for."""
    codes = (100 * torch.randn(shape)).clamp(-448, 448).to(E4M3)
    scale = (torch.rand(scales) / 5000).to(dtype)
    dense = codes.float() * (scale.float().reshape(-1, 1) if scale.ndim else scale.float())
    return {"weight": codes, "weight_scale": scale}, dense


def foreign(folder: Path, out: Path, name: str, **layers: bool) -> tuple[Path, Weights]:
    """See `foreign_checkpoint`."""
    config, scales, beside = FORMATS[name]
    dtype = torch.bfloat16 if name == "dynamic" else torch.float32

    def layer(shape: torch.Size) -> tuple[Weights, torch.Tensor]:
        return packed(shape, scales(shape[0]), dtype)

    return foreign_checkpoint(folder, out, config, layer, beside, own_file=name == "modelopt's file", **layers)


def assert_alike(ours: afnext.Model, *where: Any) -> None:
    """The weights are equal, and the results but for the rounding of inputs."""
    assert_imported(ours, "fp8", *where, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("name", FORMATS)
def test_an_imported_model_is_the_dense_one_that_it_stands_for(
    folder: Path, tmp_path: Path, name: str, seed: int
) -> None:
    source, dense = foreign(folder, tmp_path / "source", name)
    done = quantize(source, tmp_path / "out", REST)
    assert done["rules"][0] == ["decoder.layers.*", "fp8"]
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert_alike(afnext.load(tmp_path / "out", dtype="float32"), folder, dense, tmp_path / "dense")


def test_every_matrix_may_be_imported_and_a_backbone_alone(folder: Path, tmp_path: Path, seed: int) -> None:
    source, dense = foreign(folder, tmp_path / "everywhere", "dynamic", everywhere=True)
    quantize(source, tmp_path / "out", REST)
    assert_alike(afnext.load(tmp_path / "out", dtype="float32"), folder, dense, tmp_path / "dense")
    source, dense = foreign(folder, tmp_path / "backbone", "modelopt", backbone=True)
    quantize(folder, tmp_path / "joined", REST, backbone=source)
    assert_alike(afnext.load(tmp_path / "joined", dtype="float32"), folder, dense, tmp_path / "dense2")


def lost_scale(tensors: Weights, config: dict[str, Any]) -> None:
    del tensors[next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight_scale"))]


def groups(tensors: Weights, config: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight_scale"))
    tensors[name] = tensors[name].expand(-1, 2).contiguous()


def nan_code(tensors: Weights, config: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name].view(torch.uint8)[3, 4] = 255


def infinite_scale(tensors: Weights, config: dict[str, Any]) -> None:
    tensors[next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight_scale"))][2] = torch.inf


def blocks(tensors: Weights, config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "block"


def integers(tensors: Weights, config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "int"


def awq(tensors: Weights, config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}


def dense_layer(tensors: Weights, config: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name] = tensors[name].bfloat16()


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lost_scale, CheckpointError, "up_proj"),
        (groups, ImportFormatError, r"up_proj.weight_scale is torch.bfloat16 \[192, 2\]"),
        (nan_code, ImportFormatError, "up_proj has weights or scales that are not finite"),
        (infinite_scale, ImportFormatError, "up_proj has weights or scales that are not finite"),
        (blocks, ImportFormatError, "strategy 'block'"),
        (integers, ImportFormatError, "type float"),
        (awq, ImportFormatError, "'W4A8_AWQ' cannot be imported"),
        (dense_layer, ImportFormatError, "not a matrix in e4m3"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(
    folder: Path,
    tmp_path: Path,
    change: Callable[[Weights, dict[str, Any]], None],
    error: type[AfnextError],
    named: str,
    seed: int,
) -> None:
    source, _ = foreign(folder, tmp_path / "source", "dynamic")
    rewrite(source, change)
    with pytest.raises(error, match=named):
        quantize(source, tmp_path / "out", REST)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("name", ["dynamic", "modelopt", "modelopt's file"])
def test_loading_it_says_how_to_import_it(folder: Path, tmp_path: Path, name: str) -> None:
    source, _ = foreign(folder, tmp_path / "source", name)
    with pytest.raises(ConfigError, match="afnext quantize"):
        afnext.load(source)
