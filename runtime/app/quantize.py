"""Quantizing a checkpoint once for all: dense weights in, or what other libraries made of them, a folder with ours out.

Every tensor is read, packed and written before the next one, so memory peaks at the largest of them. The folder has all
that loading needs: weights under canonical names, config.json with what they are packed by, tokenizer and templates.
"""

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from ..model.foreign import ForeignCheckpoint, is_foreign
from ..model.hub import resolve
from ..model.parameters import part_of
from ..model.quantized import expected_tensors, quantization_metadata, to_quantize

_HASHED_AT_ONCE = 1 << 25
_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "NOTICE*")


class OutputError(AfnextError):
    """The folder to write into cannot be used."""


@dataclass(frozen=True)
class _Work:
    """What is to be written: by which recipe, what that stores, and its tensors, which come from `sources`."""

    recipe: Recipe
    expected: dict[str, Stored]
    tensors: Iterator[tuple[str, torch.Tensor]]
    sources: tuple[Checkpoint, ...]
    before: dict[str, int]


def quantize(
    source: str | PathLike[str],
    out: str | PathLike[str],
    recipe: Recipe,
    *,
    backbone: str | PathLike[str] | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `source` (a folder or Hub name), packed by `recipe`, into the new folder `out`.

    Layers that GPTQ, AWQ or compressed-tensors quantized to 4 bits, in `source` or in `backbone`, keep their bits. The
    latter is a folder or Hub name of a quantized Qwen2, taken in place of the decoder of `source`. device: where to
    compute. `progress` is called with (stored bytes read, of all). Returns what came of it as plain values: files,
    bytes and bytes by part before and after, seconds. Raises OutputError if `out` holds something, ConfigError if the
    source is quantized by afnext already, SchemeError naming a layer that its scheme cannot store, ImportFormatError
    for weights of other libraries that have no equal here.
    """
    begun = time.perf_counter()
    folder, target = resolve(source, revision=revision), Path(out)
    if backbone is not None or is_foreign(folder):
        work = _import_work(folder, None if backbone is None else resolve(backbone), recipe, device, progress)
    else:
        work = _dense_work(folder, recipe, device, progress)
    _check_empty(target)
    target.mkdir(parents=True, exist_ok=True)
    unknown = replace(work.recipe, source="0" * 64)
    writer = CheckpointWriter(target, work.expected, quantization_metadata(unknown), shard_bytes)
    for name, tensor in work.tensors:
        writer.write(name, tensor)
    known = replace(work.recipe, source=weights_hash(*work.sources))
    files = writer.finish(quantization_metadata(known))
    copy_texts(folder, target, known)
    sizes = {name: math.prod(stored.shape) * stored.dtypes[0].itemsize for name, stored in work.expected.items()}
    before, after = _by_part(work.before), _by_part(sizes)
    return {
        "source": str(source),
        "out": str(target),
        "recipe": work.recipe.name,
        "rules": work.recipe.to_dict()["rules"],
        "files": [file.name for file in files],
        "source_hash": known.source,
        "bytes_before": sum(before.values()),
        "bytes": sum(after.values()),
        "bytes_before_by_part": before,
        "bytes_by_part": after,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _dense_work(
    folder: Path, recipe: Recipe, device: torch.device | str, progress: Callable[[int, int], None] | None
) -> _Work:
    checkpoint, config = open_with_config(folder)
    if config.quantization is not None:
        raise ConfigError(f"{folder} is quantized already ({config.quantization.name}); give the dense weights")
    tensors = load_weights(checkpoint, config, device=device, dtype=None, quant=recipe, progress=progress)
    before = {name: checkpoint.tensor(name).nbytes for name in checkpoint.names}
    stored = as_stored(lambda name: checkpoint.dtype(name) if name in checkpoint else None, to_quantize(config, recipe))
    return _Work(recipe, stored, tensors, (checkpoint,), before)


def _import_work(
    folder: Path,
    backbone: Path | None,
    recipe: Recipe,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None,
) -> _Work:
    checkpoint = ForeignCheckpoint(folder) if backbone is None else ForeignCheckpoint(backbone, folder)
    whole = checkpoint.recipe(recipe)
    tensors = checkpoint.tensors(whole, torch.device(device), progress or (lambda done, total: None))
    stored = as_stored(checkpoint.dtype, to_quantize(checkpoint.config, whole))
    return _Work(whole, stored, tensors, checkpoint.sources, checkpoint.sizes())


def as_stored(dtype: Callable[[str], torch.dtype | None], config: ModelConfig) -> dict[str, Stored]:
    """What a quantized checkpoint holds: for each tensor one shape, and the one dtype that `dtype` tells, if any."""
    return {
        name: Stored(stored.shape, (dtype(name) or stored.dtypes[0],))
        for name, stored in expected_tensors(config).items()
    }


def weights_hash(*checkpoints: Checkpoint) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors of checkpoints, in the order of their names."""
    digest = hashlib.sha256()
    for checkpoint, name in ((each, name) for each in checkpoints for name in sorted(each.names)):
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


def _by_part(sizes: Mapping[str, int]) -> dict[str, int]:
    parts: Counter[str] = Counter()
    for name, nbytes in sizes.items():
        parts[part_of(name)] += nbytes
    return dict(parts)
