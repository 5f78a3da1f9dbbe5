"""Choices by timing on this machine, under `AFNEXT_AUTOTUNE=1`: the file that keeps them, and the clock.

The file is `afnext/autotune.json` under the user's cache folder (`XDG_CACHE_HOME`). The key of an entry names what the
choice depends on, in parts: the GPU, the versions of Triton and of the libraries that were timed, what is chosen for,
and the shapes. After an upgrade the key is another, so what was chosen before is not used.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .compilation import is_collecting
from .triton_language import triton

_SEPARATOR = " | "
_log = logging.getLogger("afnext.kernels")


def wanted() -> bool:
    """Whether choices are made by timing, and those in the file are used."""
    return os.environ.get("AFNEXT_AUTOTUNE") == "1"


def may_time(device: torch.device) -> bool:
    """Whether choices may be timed on `device` now: they are wanted, it is a GPU, and launches run at once, neither
    captured into a graph nor collected for the compiler."""
    if not wanted() or not has_chip(device) or is_collecting():
        return False
    return not torch.cuda.is_current_stream_capturing()


def has_chip(device: torch.device) -> bool:
    """Whether `device` is a GPU of this machine; fake tensors say "cuda" on any machine."""
    return device.type == "cuda" and torch.cuda.is_available()


def entry_name(device: torch.device, subject: str, key: object, versions: tuple[str, ...] = ()) -> str:
    """The key of an entry in the file. subject: what the choice is for; key: the shapes; versions: of libraries."""
    parts = (torch.cuda.get_device_name(device), f"triton {triton.__version__}", *versions, subject, str(key))
    return _SEPARATOR.join(parts)


def entry_parts(name: str) -> tuple[str, str, str]:
    """The parts of an entry's key: GPU and versions, what the choice is for, the shapes."""
    *machine, subject, key = ["", "", *name.split(_SEPARATOR)]
    return _SEPARATOR.join(filter(None, machine)), subject, key


def milliseconds(function: Callable[[], object]) -> float:
    """The median time of a function on the GPU."""
    return float(triton.testing.do_bench(function, return_mode="median"))


def stored() -> dict[str, Any]:
    """All entries of the file. Warns and returns none if it cannot be read."""
    try:
        entries = json.loads(path().read_text())
        if isinstance(entries, dict):
            return entries
        _log.warning("%s has no table of choices and is ignored", path())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be read and is ignored: %s", path(), error)
    return {}


def store(name: str, value: Any) -> None:
    """Add one entry. The file is replaced atomically, so another process never reads half of it."""
    target = path()
    table = {**stored(), name: value}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
            json.dump(table, file, indent=1, sort_keys=True)
        Path(file.name).replace(target)
    except OSError as error:
        _log.warning("%s cannot be written; the choice is kept for this process only: %s", target, error)


def path() -> Path:
    """The file."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afnext" / "autotune.json"
