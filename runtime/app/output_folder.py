"""An output folder for a checkpoint, locked to one run at a time, and the files copied into it beside the weights."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ...quant.recipe import Recipe
from ..checkpoint_folder import MODELOPT_FILE, CheckpointFolder, EmbeddedFiles
from ..errors import CheckpointError, OutputError
from ..files import open_regular, output_file, unwritable
from ..model.component_config import COMPONENTS
from .model_card import FILE as CARD
from .model_card import SOURCE_FILE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"
_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "NOTICE*")


@contextmanager
def locked_folder(target: Path) -> Iterator[bool]:
    """Create the folder `target` if it does not exist, and lock it against other runs during the `with` block.

    Yields whether the folder could be locked; some network file systems do not support it. A folder that the block
    leaves empty is removed. Raises OutputError if another run has locked the folder, if it cannot be created, and for
    every OSError in the block.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; give a new folder to write into")
    descriptor, locked, ours = None, False, True
    try:
        target.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            descriptor = os.open(target, os.O_RDONLY)
            ours = False
            locked = lock_file(descriptor, target)
            ours = True
        yield locked
    except OSError as problem:
        raise unwritable(target, problem, OutputError) from None
    finally:
        if ours:
            with suppress(OSError):
                target.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def lock_file(descriptor: int, target: Path) -> bool:
    """Lock the open file or folder `target` against other runs until it is closed. Returns whether that was possible.

    Raises OutputError if another run has locked it.
    """
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise OutputError(f"another run is writing into {target}; wait for it, or choose another one") from None
        except OSError:  # a file system without locks
            pass
    return False


def check_room(target: Path, nbytes: int) -> None:
    """Raise OutputError if the disk of the folder `target` has less than `nbytes` free."""
    free = shutil.disk_usage(target).free
    if free < nbytes:
        raise OutputError(
            f"{target} has room for {free:,} bytes, and {nbytes:,} are to be written; free some space, or choose "
            "another folder"
        )


def text_files(files: CheckpointFolder) -> list[str]:
    """The names, within a checkpoint, of the files to copy with its weights, without config.json.

    Raises CheckpointError for a link to a target outside the folder (for the Hub's cache, outside the repository),
    which may be private, and for anything that is not a regular file.
    """
    if isinstance(files, EmbeddedFiles):
        return [name for name in sorted(files.contents) if name != CONFIG and _is_text(name)]
    source = files.path
    roots = [source.resolve()]
    if source.parent.name == "snapshots":  # in the Hub's cache, where every file is a link to a blob
        roots.append((source.parent.parent / "blobs").resolve())
    names = []
    for part in ("", *COMPONENTS):
        for path in sorted({path for pattern in _TEXT_FILES for path in (source / part).glob(pattern)}):
            name = path.relative_to(source).as_posix()
            if name in (CONFIG, MODELOPT_FILE) or name.endswith(".safetensors.index.json") or path.is_dir():
                continue
            if not any(path.resolve().is_relative_to(root) for root in roots):
                raise CheckpointError(
                    f"{path} leads out of the checkpoint's folder and would be copied; remove it, or put a copy there"
                )
            if not path.is_file():
                raise CheckpointError(f"{path} is not a regular file and cannot be copied; remove it")
            names.append(name)
    return names


def _is_text(name: str) -> bool:
    return any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in _TEXT_FILES)


def copy_texts(files: CheckpointFolder, target: Path, recipe: Recipe) -> None:
    """Copy everything but the weights; README.md becomes README-source.md, because `target` has its own card.

    The config.json, with `recipe` in it, is written last and marks `target` as complete.
    """
    config = {**files.settings(CONFIG), "quantization_config": recipe.to_dict()}
    for name in text_files(files):
        copied = target / (SOURCE_FILE if name == CARD else name)
        copied.parent.mkdir(exist_ok=True)
        with _opened(files, name) as original, output_file(copied, OutputError) as copy:
            shutil.copyfileobj(original, copy)
    with output_file(target / CONFIG, OutputError) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def _opened(files: CheckpointFolder, name: str) -> BinaryIO:
    if isinstance(files, EmbeddedFiles):
        return BytesIO(files.contents[name])
    return open_regular(files.path / name, name, CheckpointError)
