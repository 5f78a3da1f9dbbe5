"""Quantizes a checkpoint, from dense weights or another library's format, into a folder in afnext's format.

Every tensor is read, packed and written before the next one, so memory peaks at the largest tensor. The folder has
everything needed for loading: weights under canonical names, config.json with the recipe, tokenizer and templates. The
config.json is written last, so a folder that has one is complete.
"""

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ...quant.convert import SHARD_BYTES, CheckpointWriter
from ...quant.recipe import Recipe
from ...quant.scheme import Stored
from ..checkpoint_folder import CheckpointFolder
from ..errors import ConfigError, OutputError
from ..model.checkpoint import Checkpoint, load_weights
from ..model.config import ModelConfig
from ..model.foreign import ForeignCheckpoint, is_foreign
from ..model.hub import resolve
from ..model.opened import open_checkpoint
from ..model.parameters import part_of
from ..model.quantized import expected_tensors, layer_schemes, quantization_metadata, to_quantize
from .model_card import write_card
from .output_folder import check_room, copy_texts, locked_folder, text_files

_HASHED_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class _Work:
    """The output to write: its recipe, the tensors that the recipe stores, read from `sources`, and the texts in
    `files`."""

    recipe: Recipe
    expected: dict[str, Stored]
    tensors: Iterator[tuple[str, torch.Tensor]]
    sources: tuple[Checkpoint, ...]
    before: dict[str, int]
    files: CheckpointFolder


def quantize(
    source: str | PathLike[str],
    out: str | PathLike[str],
    recipe: Recipe,
    *,
    backbone: str | PathLike[str] | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    measured: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `source` (a folder, GGUF file or Hub name), packed by `recipe`, into the new folder `out`.

    Layers that GPTQ, AWQ or compressed-tensors quantized to 4 bits, or compressed-tensors or ModelOpt to e4m3 or nvfp4,
    in `source` or in `backbone`, keep their bits, and those in blocks of a GGUF file keep their values. backbone: a
    folder or Hub name of a quantized Qwen2 that replaces the decoder of `source`. device: where to compute. measured:
    measured losses, in Markdown, for the model card.
    `progress` is called with (stored bytes read, total). Returns the result as plain values: files, bytes and bytes by
    part before and after, seconds.

    Raises OutputError if `out` is not empty, is used by another run, or cannot be written, CheckpointError for a text
    file that links outside `source`, ConfigError if the source is already quantized by afnext, SchemeError naming a
    layer that its scheme cannot store or that a rule would round a second time, ImportFormatError for unsupported
    formats of other libraries.
    """
    begun = time.perf_counter()
    path, target = resolve(source, revision=revision), Path(out)
    if backbone is not None or is_foreign(path):
        work = _import_work(path, None if backbone is None else resolve(backbone), recipe, device, progress)
    else:
        work = _dense_work(path, recipe, device, progress)
    text_files(work.files)  # raises for refused links before the long computation
    sizes = {name: math.prod(stored.shape) * stored.dtypes[0].itemsize for name, stored in work.expected.items()}
    unknown = quantization_metadata(replace(work.recipe, source="0" * 64))
    with locked_folder(target) as locked:
        _prepare(target, sum(sizes.values()), locked)
        with CheckpointWriter(target, work.expected, unknown, shard_bytes) as writer:
            for name, tensor in work.tensors:
                writer.write(name, tensor)
            known = replace(work.recipe, source=weights_hash(*work.sources))
            files = writer.finish(quantization_metadata(known))
        write_card(target, os.fspath(source), work.files, known, measured)
        copy_texts(work.files, target, known)
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
    path: Path, recipe: Recipe, device: torch.device | str, progress: Callable[[int, int], None] | None
) -> _Work:
    opened = open_checkpoint(path)
    checkpoint, config = opened.weights, opened.config
    if config.quantization is not None:
        if not opened.imported:
            raise ConfigError(f"{path} is quantized already ({config.quantization.name}); give the dense weights")
        recipe = config.quantization.extended(recipe, layer_schemes(config))
    tensors = load_weights(checkpoint, config, device=device, dtype=None, quant=recipe, progress=progress)
    before = {name: checkpoint.stored_bytes(name) for name in checkpoint.names}
    stored = as_stored(lambda name: checkpoint.dtype(name) if name in checkpoint else None, to_quantize(config, recipe))
    return _Work(recipe, stored, tensors, (checkpoint,), before, opened.files)


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
    texts = CheckpointFolder(folder)
    return _Work(whole, stored, tensors, checkpoint.sources, checkpoint.sizes(), texts)


def as_stored(dtype: Callable[[str], torch.dtype | None], config: ModelConfig) -> dict[str, Stored]:
    """The tensors of a quantized checkpoint, with one shape each, and the dtype that `dtype` returns, if any."""
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


def _prepare(target: Path, nbytes: int, locked: bool) -> None:
    """Check that the folder is empty and has enough space. If it is locked, remove files of crashed runs."""
    found = [path for path in target.iterdir() if path.suffix != ".part"]
    if found:
        raise OutputError(f"{target} holds {min(found).name} already; give a new folder to write into")
    for path in target.iterdir() if locked else ():
        path.unlink()
    check_room(target, nbytes)


def _by_part(sizes: Mapping[str, int]) -> dict[str, int]:
    parts: Counter[str] = Counter()
    for name, nbytes in sizes.items():
        parts[part_of(name)] += nbytes
    return dict(parts)
