"""The stored tensors of a quantized model, and checks that files and config belong together."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ...kernels.quantize_rows import E4M3
from ...quant.recipe import Recipe
from ...quant.scheme import Scheme, SchemeError, Stored
from ..errors import CheckpointError, ConfigError
from ..files import shown
from .config import ModelConfig
from .parameters import expected_shapes

METADATA_KEY = "afnext.quantization"
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NO_MATRIX = "encoder.embed_positions.weight"  # added, not a factor of a product


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
    """The scheme that `recipe` gives the parameter with this canonical name and shape; None if it stays dense."""
    return recipe.scheme(name.removesuffix(".weight")) if is_matrix(name, shape) else None


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether schemes can store the parameter with this canonical name and shape."""
    return name.endswith(".weight") and len(shape) == 2 and name != _NO_MATRIX


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
    """The config of the model after `recipe`, if any, quantizes a checkpoint with this config.

    Raises ConfigError if the checkpoint is already quantized and `recipe` does not merely extend its rules, SchemeError
    for a rule that matches no layer.
    """
    if recipe is None or recipe == config.quantization:
        return config
    if config.quantization is not None and not recipe.extends(config.quantization):
        raise ConfigError(
            f"the checkpoint is quantized already ({config.quantization.name}), and not as requested ({recipe.name}); "
            "leave quant out, or quantize the dense weights."
        )
    check_rules(config, recipe)
    return replace(config, quantization=recipe)


def check_rules(config: ModelConfig, recipe: Recipe) -> None:
    """Raise SchemeError, listing the model's layers, if a rule of `recipe` matches none of them."""
    layers = [name.removesuffix(".weight") for name, shape in expected_shapes(config).items() if is_matrix(name, shape)]
    unused = recipe.unused_patterns(layers)
    if unused:
        kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", layer) for layer in layers)
        raise SchemeError(f"the rule for {shown(unused[0])} matches no layer of this model; it has {', '.join(kinds)}")


def check_written_for(config: ModelConfig, metadata: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """Raise CheckpointError if a file's header has another quantization than the config.

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
    """The strings in the header of a quantized file."""
    return {METADATA_KEY: json.dumps(recipe.to_dict(), sort_keys=True)}


def check_finite(tensor: torch.Tensor, where: str) -> None:
    """Raise CheckpointError, naming `where`, if scales or zeros are not finite."""
    if tensor.dtype == E4M3:  # which torch does not compare
        tensor = tensor.float()
    # One pass without a copy: the minimum and maximum of a tensor with NaN are NaN.
    if tensor.is_floating_point() and not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
        bad = int((~tensor.isfinite()).sum())
        raise CheckpointError(
            f"{where} has {bad} of {tensor.numel()} values that are not finite; the file is damaged, quantize or "
            "download it again."
        )


def check_scales(
    scheme: Scheme,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: int,
    dtype: torch.dtype | None,
    where: str,
) -> None:
    """Raise CheckpointError, naming `where`, if the scales are too large for a product.

    Each weight must be finite in `dtype`, in which the model computes (None: float32), and the sum of a row of `inputs`
    weights must be finite in float32, in which products are accumulated.
    """
    largest = scheme.largest_weight(scales, zeros)
    limit = min(torch.finfo(dtype or torch.float32).max, torch.finfo(torch.float32).max / inputs)
    if not largest <= limit:
        raise CheckpointError(
            f"{where} stands for weights up to {largest:.3g}, and a product of {inputs} inputs in "
            f"{str(dtype or torch.float32).removeprefix('torch.')} takes at most {limit:.3g}; the file is damaged, "
            "or needs another dtype."
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
