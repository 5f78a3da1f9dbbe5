"""Which tensors stand for the weights of a quantized model, and whether files and config belong together."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ...quant.recipe import Recipe
from ...quant.scheme import Scheme, SchemeError, Stored
from ..errors import CheckpointError, ConfigError
from .config import ModelConfig
from .parameters import expected_shapes

METADATA_KEY = "afnext.quantization"
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NO_MATRIX = "encoder.embed_positions.weight"  # added, not multiplied with


def layer_schemes(config: ModelConfig) -> dict[str, Scheme]:
    """Canonical name and scheme of every layer that `config.quantization` does not leave dense.

    Raises SchemeError naming a layer that its scheme cannot store.
    """
    recipe = config.quantization
    if recipe is None:
        return {}
    found = {}
    for name, shape in expected_shapes(config).items():
        scheme = scheme_of(recipe, name, shape)
        if scheme is not None:
            layer = name.removesuffix(".weight")
            _stored(layer, scheme, shape)
            found[layer] = scheme
    return found


def scheme_of(recipe: Recipe, name: str, shape: tuple[int, ...]) -> Scheme | None:
    """What `recipe` makes of the parameter with this canonical name and shape; None if it stays dense."""
    if not name.endswith(".weight") or len(shape) != 2 or name == _NO_MATRIX:
        return None
    return recipe.scheme(name.removesuffix(".weight"))


def expected_tensors(config: ModelConfig) -> dict[str, Stored]:
    """Canonical name, shape and possible dtypes of every tensor that a checkpoint of this model stores."""
    schemes = layer_schemes(config)
    expected: dict[str, Stored] = {}
    for name, shape in expected_shapes(config).items():
        layer = name.removesuffix(".weight")
        if layer != name and layer in schemes:
            parts = _stored(layer, schemes[layer], shape)
            expected |= {f"{layer}.{part}": stored for part, stored in parts.items()}
        else:
            expected[name] = Stored(shape, WEIGHT_DTYPES)
    return expected


def to_quantize(config: ModelConfig, recipe: Recipe | None) -> ModelConfig:
    """The config of the model that results where `recipe`, if any, quantizes a checkpoint with this config.

    Raises ConfigError if that is quantized already, by other rules.
    """
    if recipe is None or recipe == config.quantization:
        return config
    if config.quantization is not None:
        raise ConfigError(
            f"the checkpoint is quantized already ({config.quantization.name}), and not as asked for ({recipe.name}); "
            "leave quant out, or quantize the dense weights."
        )
    return replace(config, quantization=recipe)


def check_written_for(config: ModelConfig, metadata: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """Raise CheckpointError if a file's header tells of another quantization than the config.

    metadata: of each file, by name, the strings in its header.
    """
    for file, values in metadata.items():
        stated = _stated(values.get(METADATA_KEY), f"{folder}/{file}")
        wanted = config.quantization
        if stated != wanted or (stated and wanted and stated.source != wanted.source):
            raise CheckpointError(
                f"{folder}/{file} holds {_described(stated)}, but its config.json describes {_described(wanted)}; "
                "use the config.json that was written with it."
            )


def quantization_metadata(recipe: Recipe) -> dict[str, str]:
    """The strings that the header of a quantized file holds."""
    return {METADATA_KEY: json.dumps(recipe.to_dict(), sort_keys=True)}


def check_finite(tensor: torch.Tensor, where: str) -> None:
    """Raise CheckpointError, naming `where`, if there are numbers among scales or zeros that are not finite."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        bad = int((~tensor.isfinite()).sum())
        raise CheckpointError(
            f"{where} has {bad} of {tensor.numel()} values that are not finite; the file is damaged, quantize or "
            "download it again."
        )


def _stored(layer: str, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Stored]:
    try:
        return scheme.stored(shape)
    except SchemeError as problem:
        raise SchemeError(f"{layer} cannot be {scheme}: {problem}") from None


def _stated(text: str | None, where: str) -> Recipe | None:
    if text is None:
        return None
    try:
        return Recipe.from_dict(json.loads(text))
    except (SchemeError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"{where}: {METADATA_KEY} in its header cannot be read: {problem}") from None


def _described(recipe: Recipe | None) -> str:
    if recipe is None:
        return "dense weights"
    return f"weights quantized by {recipe.name}" + (f" from {recipe.source[:12]}" if recipe.source else "")
