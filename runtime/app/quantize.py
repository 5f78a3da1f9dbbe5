"""Quantizing a checkpoint once for all: dense weights in, a folder with packed ones out.

Every tensor is read, packed and written before the next one, so memory peaks at the largest of them. The folder has all
that loading needs: weights under canonical names, config.json with what they are packed by, tokenizer and templates.
"""

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ...kernels.errors import AfnextError
from ...quant.convert import SHARD_BYTES, CheckpointWriter
from ...quant.recipe import Recipe
from ...quant.scheme import Stored
from ..errors import ConfigError
from ..files import read_settings
from ..model.checkpoint import Checkpoint, load_weights, open_with_config
from ..model.component_config import COMPONENTS
from ..model.config import ModelConfig
from ..model.hub import resolve
from ..model.parameters import part_of
from ..model.quantized import expected_tensors, quantization_metadata, to_quantize

_HASHED_AT_ONCE = 1 << 25
_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "NOTICE*")


class OutputError(AfnextError):
    """The folder to write into cannot be used."""


def quantize(
    source: str | PathLike[str],
    out: str | PathLike[str],
    recipe: Recipe,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the dense checkpoint `source` (a folder or Hub name), packed by `recipe`, into the new folder `out`.

    device: where to compute. `progress` is called with (stored bytes read, of all). Returns what came of it as plain
    values: files, bytes and bytes by part before and after, seconds. Raises OutputError if `out` holds something,
    ConfigError if the source is quantized already, SchemeError naming a layer that its scheme cannot store.
    """
    begun = time.perf_counter()
    folder, target = resolve(source, revision=revision), Path(out)
    checkpoint, config = open_with_config(folder)
    if config.quantization is not None:
        raise ConfigError(f"{source} is quantized already ({config.quantization.name}); give the dense weights")
    expected = as_stored(checkpoint, to_quantize(config, recipe))
    _check_empty(target)
    target.mkdir(parents=True, exist_ok=True)
    unknown = replace(recipe, source="0" * 64)
    writer = CheckpointWriter(target, expected, quantization_metadata(unknown), shard_bytes)
    for name, tensor in load_weights(checkpoint, config, device=device, dtype=None, quant=recipe, progress=progress):
        writer.write(name, tensor)
    known = replace(recipe, source=weights_hash(checkpoint))
    files = writer.finish(quantization_metadata(known))
    copy_texts(folder, target, known)
    after = _by_part((name, math.prod(stored.shape) * stored.dtypes[0].itemsize) for name, stored in expected.items())
    before = _by_part((name, checkpoint.tensor(name).nbytes) for name in checkpoint.names)
    return {
        "source": str(source),
        "out": str(target),
        "recipe": recipe.name,
        "rules": recipe.to_dict()["rules"],
        "files": [file.name for file in files],
        "source_hash": known.source,
        "bytes_before": sum(before.values()),
        "bytes": sum(after.values()),
        "bytes_before_by_part": before,
        "bytes_by_part": after,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def as_stored(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Stored]:
    """What a quantized checkpoint holds that is made from a dense one: one shape and one dtype for each tensor."""
    return {
        name: Stored(stored.shape, (checkpoint.dtype(name),) if name in checkpoint else stored.dtypes[:1])
        for name, stored in expected_tensors(config).items()
    }


def weights_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a checkpoint's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.names):
        tensor = checkpoint.tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.flatten().view(torch.uint8)
        for start in range(0, len(data), _HASHED_AT_ONCE):
            piece = data[start : start + _HASHED_AT_ONCE]
            digest.update(piece.numpy().data)
            checkpoint.release(name, start + len(piece))
    return digest.hexdigest()


def copy_texts(source: Path, target: Path, recipe: Recipe) -> None:
    """Copy everything but the weights, with `recipe` in config.json."""
    for part in ("", *COMPONENTS):
        if part and not (source / part).is_dir():
            continue
        (target / part).mkdir(exist_ok=True)
        for path in sorted({path for pattern in _TEXT_FILES for path in (source / part).glob(pattern)}):
            if path.is_file() and not path.name.endswith(".safetensors.index.json"):
                shutil.copyfile(path, target / part / path.name)
    config = read_settings(source / "config.json") | {"quantization_config": recipe.to_dict()}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_empty(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; give a new folder to write into")
    if target.is_dir():
        found = [path.name for path in target.iterdir() if not path.name.endswith(".part")]
        if found:
            raise OutputError(f"{target} holds {sorted(found)[0]} already; give a new folder to write into")


def _by_part(sizes: Iterator[tuple[str, int]]) -> dict[str, int]:
    parts: Counter[str] = Counter()
    for name, nbytes in sizes:
        parts[part_of(name)] += nbytes
    return dict(parts)
