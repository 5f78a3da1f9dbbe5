"""Packed copies, which `load(quant=..., keep_packed=True)` writes once and then maps into memory."""

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ...quant.recipe import Recipe
from ..model.download import GGUF_SUFFIX
from ..model.hub import packed_folder
from .quantize import quantize

LARGE = 1 << 30
"""Bytes of dense weights above which packing them at each load causes a hint."""

_log = logging.getLogger("afnext")


def packed_copy(
    source: Path, recipe: Recipe, *, device: torch.device, progress: Callable[[int, int], None] | None = None
) -> Path:
    """The folder of a copy of the dense checkpoint `source` packed by `recipe`, which is written if it does not exist.

    Its name depends on the recipe and on path, sizes and times of the source's files, so a changed source is packed
    again. Several processes may call this at once. Raises the errors of `quantize`.
    """
    folder = packed_folder() / f"{_readable(source)}-{recipe.name}-{_key(source, recipe)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        quantize(source, unfinished, recipe, device=device, progress=progress)
        unfinished.chmod(0o755)
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # if another process was faster, its copy is used
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _log.info("the packed copy is kept in %s", folder)
    return folder


def hint(model: str, source: Path, quant: str, nbytes: int) -> None:
    """Log how to keep the packed weights, if they are large. model: the name given by the user; source: its folder."""
    if nbytes >= LARGE:
        _log.warning(
            "%.1f GB of weights were packed while loading, as they will be each time. To do it once: keep_packed=True "
            "(--keep-packed) keeps a copy in %s, or run `afnext quantize %s %s-%s --scheme %s` and load that folder.",
            nbytes / 1e9,
            packed_folder(),
            shlex.quote(model),
            shlex.quote(_readable(source)),
            quant,
            quant,
        )


def _readable(source: Path) -> str:
    """A readable name: that of the folder, or of the snapshot's repository."""
    repository = re.search(r"models--(?:.+?)--([^/]+)/snapshots/", source.absolute().as_posix())
    return repository[1] if repository and source.is_dir() else source.absolute().name.removesuffix(GGUF_SUFFIX)


def _key(source: Path, recipe: Recipe) -> str:
    if source.is_dir():
        folder, found = source, [source.rglob(pattern) for pattern in ("*.safetensors", "*.json", f"*{GGUF_SUFFIX}")]
    else:
        folder, found = source.parent, [source.parent.glob(f"*{GGUF_SUFFIX}")]  # a pair has two files
    files = sorted(path for paths in found for path in paths)
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    described = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    text = json.dumps([str(source.resolve()), recipe.to_dict(), described])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
