"""Checkpoints whose decoder another library quantized to 4 bits, as what this runtime stores: the same bits, reordered.

Either a whole Audio Flamingo Next, or its Qwen2 backbone alone (`model.layers.0...`), whose encoder and adaptor come
from a dense checkpoint. See `quant.importers` for the formats.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ...quant.importers import PARTS, ForeignFormat, ImportFormatError
from ...quant.recipe import Recipe
from ...quant.scheme import Int4, Packed, Scheme, Stored
from ..errors import CheckpointError, ConfigError
from ..files import read_settings
from .checkpoint import Checkpoint
from .checkpoint_files import first_five
from .config import ModelConfig
from .parameters import expected_shapes
from .quantized import WEIGHT_DTYPES, layer_schemes

_HEAD = "decoder.lm_head.weight"
_METHODS = ("gptq", "awq", "compressed-tensors")


def is_foreign(folder: Path) -> bool:
    """Whether the config.json in `folder` says that another library quantized the weights."""
    stated = read_settings(folder / "config.json").get("quantization_config")
    return isinstance(stated, dict) and stated.get("quant_method") in _METHODS


class ForeignCheckpoint:
    """The tensors of a checkpoint that another library quantized, by canonical name, those that lack from another."""

    def __init__(self, folder: Path, dense: Path | None = None):
        """folder: of the quantized weights; dense: of a whole dense checkpoint, where `folder` holds a backbone alone.

        Raises CheckpointError, ConfigError, or ImportFormatError for weights that have no equal here.
        """
        settings = read_settings(folder / "config.json")
        self.format = ForeignFormat.from_config(settings.get("quantization_config"))
        self.folder = folder
        self.files = Checkpoint.open(folder)
        self._rest = None if dense is None else Checkpoint.open(dense)
        self._stored = {_canonical(name): name for name in self.files.names}
        if len(self._stored) < len(self.files.names):
            raise CheckpointError(f"{folder} holds a tensor under two names, as a backbone's and as a decoder's")
        self.config = self._config(settings, dense)
        self.layers = self._layers()
        self._check_names()

    def recipe(self, rest: Recipe) -> Recipe:
        """What the imported layers are stored by, and `rest` for all others."""
        schemes = {layer: self._scheme(layer) for layer in self.layers}
        decoder = {name.removesuffix(".weight") for name in expected_shapes(self.config) if _is_product(name)}
        if set(schemes) == decoder and len(set(schemes.values())) == 1:
            own: list[tuple[str, Scheme | None]] = [("decoder.layers.*", next(iter(schemes.values())))]
        else:
            own = list(schemes.items())
        return Recipe(f"{self.format.method} and {rest.name}", (*own, *rest.rules))

    def expected(self, recipe: Recipe) -> dict[str, Stored]:
        """Shape and dtype of each tensor that the imported checkpoint will hold."""
        schemes = layer_schemes(replace(self.config, quantization=recipe))
        found: dict[str, Stored] = {}
        for name, shape in expected_shapes(self.config).items():
            layer = name.removesuffix(".weight")
            if name != layer and layer in schemes:
                # Codes have one dtype, and scales may keep the one that the other library gave them.
                scales = self._scale_dtype(layer) if self._is_imported(name) else None
                for part, stored in schemes[layer].stored(shape).items():
                    dtype = scales if scales is not None and part != "weight_codes" else stored.dtypes[0]
                    found[f"{layer}.{part}"] = Stored(stored.shape, (dtype,))
            else:
                found[name] = Stored(shape, (self._dense(name).dtype,))
        return found

    def tensors(self, recipe: Recipe, progress: Callable[[int, int], None]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of each tensor of `expected`, one layer in memory at a time."""
        schemes = layer_schemes(replace(self.config, quantization=recipe))
        sizes = self.sizes()
        total, done = sum(sizes.values()), 0
        for name in expected_shapes(self.config):
            layer = name.removesuffix(".weight")
            if self._is_imported(name):
                yield from self._packed(layer).named(name).items()
            elif name != layer and layer in schemes:
                yield from schemes[layer].quantize(self._dense(name)).named(name).items()
                self._release(name)
            else:
                yield name, self._dense(name)
                self._release(name)
            done += sizes[name]
            progress(done, total)

    def sizes(self) -> dict[str, int]:
        """Stored bytes of each parameter."""
        return {
            name: sum(part.nbytes for part in self._parts(name.removesuffix(".weight")).values())
            if self._is_imported(name)
            else self._dense(name).nbytes
            for name in expected_shapes(self.config)
        }

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that the tensors come from."""
        return (self.files,) if self._rest is None else (self.files, self._rest)

    def _config(self, settings: dict[str, object], dense: Path | None) -> ModelConfig:
        if dense is not None:
            config = ModelConfig.from_folder(dense)
            if config.quantization is not None:
                raise ConfigError(f"{dense} is quantized; the rest of the model has to come from dense weights")
        elif "audio_config" in settings:
            own = {key: value for key, value in settings.items() if key != "quantization_config"}
            config = ModelConfig.from_dict(own, read_settings(self.folder / "processor_config.json"))
        else:
            raise ConfigError(
                f"{self.folder} has no audio_config, so it is a backbone alone: quantize the dense Audio Flamingo Next "
                "and give this folder as its backbone"
            )
        head = any(_HEAD in names for names in (self._stored, self._rest or ()))
        return replace(
            config, decoder=replace(config.decoder, tie_word_embeddings=not head and config.decoder.tie_word_embeddings)
        )

    def _layers(self) -> tuple[str, ...]:
        """Canonical names of the layers that hold codes."""
        first = PARTS[self.format.method][0]
        found = tuple(name.removesuffix(f".{first}") for name in self._stored if name.endswith(f".{first}"))
        if not found:
            raise ImportFormatError(f"{self.folder} says {self.format.method} and holds no layer with .{first}")
        return found

    def _check_names(self) -> None:
        shapes = expected_shapes(self.config)
        parts = {f"{layer}.{part}" for layer in self.layers for part in PARTS[self.format.method]}
        unknown = [name for name in self._stored if name not in parts and name not in shapes]
        unknown += [layer for layer in self.layers if not _is_product(f"{layer}.weight")]
        if unknown:
            raise CheckpointError(
                f"{self.folder} holds {len(unknown)} tensors that the model has no use for ({first_five(unknown)}); "
                "it belongs to another model, or was quantized in layers that cannot be imported"
            )
        missing = [
            name
            for name in shapes
            if not self._is_imported(name) and name not in self._stored and not self._may_come_from_rest(name)
        ]
        if missing:
            raise CheckpointError(f"{self.folder} lacks {len(missing)} tensors ({first_five(missing)})")
        for name, shape in shapes.items():
            imported = self._is_imported(name)
            found = self._shape(name.removesuffix(".weight")) if imported else tuple(self._dense(name).shape)
            if found != shape or not (imported or self._dense(name).dtype in WEIGHT_DTYPES):
                raise CheckpointError(
                    f"{name} in {self.folder} is {list(found)} where the model has {list(shape)}, or in a dtype that "
                    "weights do not have; it belongs to another model"
                )

    def _is_imported(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self.layers

    def _may_come_from_rest(self, name: str) -> bool:
        """Not the decoder: half of one and half of another would be no model. Its head may, if the backbone is tied."""
        return self._rest is not None and name in self._rest and (name == _HEAD or not name.startswith("decoder."))

    def _shape(self, layer: str) -> tuple[int, int]:
        return self.format.shape(layer, self.files.shape(self._stored[f"{layer}.{PARTS[self.format.method][0]}"]))

    def _place(self, name: str) -> tuple[Checkpoint, str]:
        """Where the dense tensor lies, and what it is called there."""
        if name in self._stored:
            return self.files, self._stored[name]
        assert self._rest is not None
        return self._rest, name

    def _dense(self, name: str) -> torch.Tensor:
        checkpoint, stored_name = self._place(name)
        return checkpoint.tensor(stored_name)

    def _release(self, name: str) -> None:
        checkpoint, stored_name = self._place(name)
        checkpoint.release(stored_name)

    def _parts(self, layer: str) -> dict[str, torch.Tensor]:
        names = {part: self._stored.get(f"{layer}.{part}") for part in PARTS[self.format.method]}
        return {part: self.files.tensor(name) for part, name in names.items() if name is not None}

    def _packed(self, layer: str) -> Packed:
        parts = self._parts(layer)
        packed = Packed(*self.format.weight(layer, parts))
        for part in parts:
            self.files.release(self._stored[f"{layer}.{part}"])
        return packed

    def _scheme(self, layer: str) -> Int4:
        group = self.format.stored_group(layer, self._shape(layer)[1])
        return Int4(group, self.format.is_symmetric(layer, self._parts(layer)))

    def _scale_dtype(self, layer: str) -> torch.dtype:
        part = "weight_scale" if self.format.method == "compressed-tensors" else "scales"
        return self.files.dtype(self._stored[f"{layer}.{part}"])


def _canonical(name: str) -> str:
    """A backbone's names begin where those of a decoder do."""
    return "decoder." + name.removeprefix("model.") if name.startswith("model.") else name


def _is_product(name: str) -> bool:
    return name.startswith("decoder.layers.") and name.endswith("proj.weight")
