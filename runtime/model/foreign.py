"""Checkpoints whose layers another library quantized, in this runtime's layout: the decoder's in 4 bits, reordered, or
any in e4m3 or nvfp4, as they are.

Either a whole Audio Flamingo Next, or only its Qwen2 backbone (`model.layers.0...`), with the encoder and adaptor from
a dense checkpoint. See `quant.importers`, `quant.fp8_importer` and `quant.nvfp4_importer` for the formats.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...kernels.packed_weight import Packed
from ...quant.float_importer import FloatFormat
from ...quant.foreign_format import foreign_format
from ...quant.fp8_importer import Fp8Format
from ...quant.importers import ImportFormatError
from ...quant.recipe import Recipe
from ...quant.scheme import Fp4, Fp8, Int4, Scheme
from ..checkpoint_folder import MODELOPT_FILE, CheckpointFolder
from ..errors import CheckpointError, ConfigError
from .checkpoint import Checkpoint, weight_tensors
from .checkpoint_files import first_five
from .config import ModelConfig
from .opened import LM_HEAD, open_checkpoint, with_stored_head
from .parameters import Shapes, expected_shapes
from .quantized import WEIGHT_DTYPES, is_matrix, layer_schemes

_SCALES = {"gptq": "scales", "gptq_v2": "scales", "awq": "scales", "compressed-tensors": "weight_scale"}
_METHODS = ("gptq", "awq", "compressed-tensors", "modelopt")


def is_foreign(folder: Path) -> bool:
    """Whether the config.json in `folder` says that another library quantized the weights."""
    stated = _stated(CheckpointFolder(folder))
    return isinstance(stated, dict) and stated.get("quant_method") in _METHODS


def _stated(texts: CheckpointFolder) -> Any:
    """The quantization that config.json states, or ModelOpt's own file."""
    stated = texts.settings("config.json").get("quantization_config")
    if stated is None and isinstance(own := texts.settings(MODELOPT_FILE).get("quantization"), dict):
        return {**own, "quant_method": "modelopt"}
    return stated


class ForeignCheckpoint:
    """The tensors of a checkpoint that another library quantized, by canonical name; missing ones from a dense one."""

    def __init__(self, folder: Path, dense: Path | None = None):
        """folder: of the quantized weights; dense: of a whole dense checkpoint, if `folder` holds only a backbone.

        Raises CheckpointError, ConfigError, or ImportFormatError for weights in an unsupported format.
        """
        texts = CheckpointFolder(folder)
        self.format = foreign_format(_stated(texts))
        self.folder = folder
        self.files = Checkpoint.open(folder)
        if dense is None:
            self._rest, config = None, self._own_config(texts)
        else:
            opened = open_checkpoint(dense)
            self._rest, config = opened.weights, opened.config
            if config.quantization is not None:
                raise ConfigError(f"{dense} is quantized; the rest of the model has to come from dense weights")
        self.config = with_stored_head(config, self.files)
        self.layers = self._layers()
        self._check_names()

    def recipe(self, rest: Recipe) -> Recipe:
        """The recipe of the imported layers, and `rest` for all others."""
        schemes = {layer: self._scheme(layer) for layer in self.layers}
        decoder = {name.removesuffix(".weight") for name in expected_shapes(self.config) if _is_product(name)}
        if set(schemes) == decoder and len(set(schemes.values())) == 1:
            own: list[tuple[str, Scheme | None]] = [("decoder.layers.*", next(iter(schemes.values())))]
        else:
            own = list(schemes.items())
        return Recipe(f"{self.format.method} and {rest.name}", (*own, *rest.rules))

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of the imported tensor `name`; None if the recipe decides. Scales and zeros keep their stored
        dtype."""
        layer, _, part = name.rpartition(".")
        if layer in self.layers and part in ("weight_scales", "weight_zeros") and not self._is_float:
            return self.files.dtype(f"{layer}.{_SCALES[self.format.method]}")
        source = self._source(name)
        return source.dtype(name) if name in source else None

    def tensors(
        self, recipe: Recipe, device: torch.device, progress: Callable[[int, int], None]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of each tensor of the imported checkpoint, one layer in memory at a time."""
        schemes = layer_schemes(replace(self.config, quantization=recipe))
        sizes = self.sizes()
        total, done = sum(sizes.values()), 0
        for name, size in sizes.items():
            layer = name.removesuffix(".weight")
            if self._is_imported(name):
                yield from self._packed(layer).named(name).items()
            else:
                yield from weight_tensors(self._source(name), name, schemes.get(layer), device, None)
            done += size
            progress(done, total)

    def sizes(self) -> dict[str, int]:
        """Stored bytes of each parameter."""
        return {
            name: sum(map(self.files.stored_bytes, self._part_names(name.removesuffix(".weight")).values()))
            if self._is_imported(name)
            else self._source(name).tensor(name).nbytes
            for name in expected_shapes(self.config)
        }

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that the tensors come from."""
        return (self.files,) if self._rest is None else (self.files, self._rest)

    def _own_config(self, texts: CheckpointFolder) -> ModelConfig:
        settings = texts.settings("config.json")
        if "audio_config" not in settings:
            raise ConfigError(
                f"{self.folder} has no audio_config, so it is a backbone alone: quantize the dense Audio Flamingo Next "
                "and give this folder as its backbone"
            )
        dense = {key: value for key, value in settings.items() if key != "quantization_config"}
        return ModelConfig.from_dict(dense, texts.settings("processor_config.json"))

    def _layers(self) -> tuple[str, ...]:
        """Canonical names of the layers that hold codes."""
        mark = self.format.mark
        found = tuple(name.removesuffix(f".{mark}") for name in self.files.names if name.endswith(f".{mark}"))
        if not found:
            raise ImportFormatError(f"{self.folder} says {self.format.method} but has no layer with .{mark}")
        return found

    def _check_names(self) -> None:
        shapes = expected_shapes(self.config)
        parts = {f"{layer}.{part}" for layer in self.layers for part in self.format.parts}
        unknown = [name for name in self.files.names if name not in parts and name not in shapes]
        unknown += [layer for layer in self.layers if not self._may_be_imported(f"{layer}.weight", shapes)]
        if unknown:
            raise CheckpointError(
                f"{self.folder} holds {len(unknown)} tensors that the model does not use ({first_five(unknown)}); "
                "it belongs to another model, or was quantized in layers that cannot be imported"
            )
        if isinstance(self.format, Fp8Format):
            unscaled = [
                name
                for name in self.files.names
                if name in shapes and self.files.stored_dtype(name).startswith("F8") and not self._is_imported(name)
            ]
            if unscaled:
                raise CheckpointError(
                    f"{self.folder} lacks the .{self.format.mark} of {len(unscaled)} weights in 8 bits "
                    f"({first_five(unscaled)}); download it again"
                )
        missing = [
            name
            for name in shapes
            if not self._is_imported(name) and name not in self.files and not self._may_come_from_rest(name)
        ]
        if missing:
            raise CheckpointError(f"{self.folder} lacks {len(missing)} tensors ({first_five(missing)})")
        for name, shape in shapes.items():
            imported = self._is_imported(name)
            found = self._shape(name.removesuffix(".weight")) if imported else self._source(name).shape(name)
            if found != shape or not (imported or self._source(name).dtype(name) in WEIGHT_DTYPES):
                raise CheckpointError(
                    f"{name} in {self.folder} is {list(found)} where the model has {list(shape)}, or in a dtype that "
                    "weights do not have; it belongs to another model"
                )

    def _is_imported(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self.layers

    @property
    def _is_float(self) -> bool:
        return isinstance(self.format, FloatFormat)

    def _may_be_imported(self, name: str, shapes: Shapes) -> bool:
        """Whether the parameter may be quantized: as 4-bit integers the decoder's products, as floats every
        matrix."""
        if self._is_float:
            return name in shapes and is_matrix(name, shapes[name])
        return _is_product(name)

    def _may_come_from_rest(self, name: str) -> bool:
        """Whether a tensor may come from the dense checkpoint: not the decoder's, except the head of a tied
        backbone."""
        return self._rest is not None and name in self._rest and (name in LM_HEAD or not name.startswith("decoder."))

    def _shape(self, layer: str) -> tuple[int, int]:
        return self.format.shape(layer, self.files.shape(f"{layer}.{self.format.codes}"))

    def _source(self, name: str) -> Checkpoint:
        """The checkpoint that the dense parameter comes from."""
        return self.files if self._rest is None or name in self.files else self._rest

    def _part_names(self, layer: str) -> dict[str, str]:
        names = {part: f"{layer}.{part}" for part in self.format.parts}
        return {part: name for part, name in names.items() if name in self.files}

    def _parts(self, layer: str) -> dict[str, torch.Tensor]:
        """The tensors of a layer by part, in the dtypes of the file."""
        return {part: self.files.parameters[name].tensor() for part, name in self._part_names(layer).items()}

    def _packed(self, layer: str) -> Packed:
        parts = self._parts(layer)
        packed = Packed(*self.format.weight(layer, parts))
        for part in parts:
            self.files.release(f"{layer}.{part}")
        return packed

    def _scheme(self, layer: str) -> Scheme:
        if isinstance(self.format, FloatFormat):
            return Fp8() if isinstance(self.format, Fp8Format) else Fp4()
        group = self.format.stored_group(layer, self._shape(layer)[1])
        return Int4(group, self.format.is_symmetric(layer, self._parts(layer)))


def _is_product(name: str) -> bool:
    return name.startswith("decoder.layers.") and name.endswith("proj.weight")
