"""Block sizes, warps and stages of the Triton kernels: a small table by chip family, with a default for each kernel.

`family(device)` names the chip; `multiprocessors(device)` is the number of multiprocessors that a grid should fill.
Neither waits for the device. Tensors that are not on a GPU (CPU, meta, fake) count as on "sm90", or on the family given
to `with targeting("sm86"):`, which allows kernels to be compiled ahead of time for chips that this machine lacks.

The tables decide by default. With `AFNEXT_AUTOTUNE=1` a kernel that has candidates times them, once for each key of
shapes, and stores the fastest in `afnext/autotune.json` under the user's cache folder (`XDG_CACHE_HOME`), by GPU,
Triton version, kernel and key.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .chips import CHIPS
from .errors import BackendError
from .triton_language import triton

DEFAULT_FAMILY = "sm90"

_target: ContextVar[str | None] = ContextVar("afnext_target", default=None)
_log = logging.getLogger("afnext.kernels")


@contextmanager
def targeting(name: str) -> Iterator[None]:
    """Use the chip family `name`, a key of `CHIPS`, whatever the device. Raises BackendError for unknown names."""
    if name not in CHIPS:
        raise BackendError(f"unknown chip family {name!r}; choose one of {', '.join(CHIPS)}")
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def family(device: torch.device) -> str:
    """The key of `CHIPS` for the kernels' tables. Raises BackendError for a GPU before compute capability 8."""
    if (name := _target.get()) is not None:
        return name
    return _family(_index(device)) if _has_chip(device) else DEFAULT_FAMILY


def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors (compute units): the chip's own count, or its family's typical one."""
    if _target.get() is None and _has_chip(device):
        return _multiprocessors(_index(device))
    return CHIPS[family(device)].multiprocessors


def _has_chip(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()  # fake tensors say "cuda" on any machine


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _family(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    return _family_of(*torch.cuda.get_device_capability(index))


def _family_of(major: int, minor: int) -> str:
    """The family of a compute capability: its own, or the nearest with no more shared memory."""
    if major < 8:
        raise BackendError(
            f"the Triton kernels need a GPU of compute capability 8.0 or later, and this one has {major}.{minor}. "
            "Set AFNEXT_BACKEND=torch."
        )
    if major == 8:
        return {0: "sm80", 9: "sm89"}.get(minor, "sm86")
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm120")


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@dataclass(frozen=True)
class Config:
    """How a kernel is launched. blocks: its constexpr sizes by name."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    def options(self) -> dict[str, int]:
        """The keyword arguments of the launch: `kernel[grid](..., **config.options())`."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


class Configs:
    """The configs of one kernel.

    kernel: its name; default: for every family without its own; by_family: keys are those of `CHIPS`; candidates:
    configs to time under `AFNEXT_AUTOTUNE=1`, empty for a kernel that is never tuned.
    """

    def __init__(
        self,
        kernel: str,
        default: Config,
        by_family: Mapping[str, Config] | None = None,
        candidates: Sequence[Config] = (),
    ):
        self.kernel = kernel
        self.default = default
        self.by_family = dict(by_family or {})
        self.candidates = tuple(candidates)
        if unknown := self.by_family.keys() - CHIPS.keys():
            raise ValueError(f"{kernel}: unknown chip families {sorted(unknown)}; known are {', '.join(CHIPS)}")

    def on(
        self, device: torch.device, key: tuple[int | str, ...] = (), launch: Callable[[Config], object] | None = None
    ) -> Config:
        """The config for `device`: the table's, or the fastest under `AFNEXT_AUTOTUNE=1`.

        key: what the fastest config depends on (shapes, dtypes); launch: runs the kernel with a config and may be
        called repeatedly.
        """
        listed = self.by_family.get(family(device), self.default)
        if launch is None or not self.candidates or not _may_tune(device):
            return listed
        name = f"{torch.cuda.get_device_name(device)} | triton {triton.__version__} | {self.kernel} | {key}"
        return _fastest(name, (listed, *self.candidates), launch)


def _may_tune(device: torch.device) -> bool:
    return (
        os.environ.get("AFNEXT_AUTOTUNE") == "1"
        and _target.get() is None
        and _has_chip(device)
        and not torch.cuda.is_current_stream_capturing()
    )


_winners: dict[str, Config] = {}


def _fastest(name: str, candidates: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    if name not in _winners:
        stored = _stored().get(name)
        known = next((config for config in candidates if asdict(config) == stored), None)
        _winners[name] = known or _timed(name, candidates, launch)
    return _winners[name]


def _timed(name: str, candidates: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    times: dict[int, float] = {}
    for i, config in enumerate(candidates):
        try:
            times[i] = _milliseconds(lambda config=config: launch(config))  # type: ignore[misc]
        except triton.runtime.errors.OutOfResources as error:
            _log.info("%s: %s does not fit: %s", name, config, error)
    if not times:
        raise BackendError(f"{name}: none of {len(candidates)} configs fits this GPU")
    winner = candidates[min(times, key=times.__getitem__)]
    _log.info("%s: %s is the fastest of %d", name, winner, len(times))
    _store(name, winner)
    return winner


def _milliseconds(function: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(function, return_mode="median"))


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afnext" / "autotune.json"


def _stored() -> dict[str, Any]:
    try:
        stored = json.loads(_path().read_text())
        if isinstance(stored, dict):
            return stored
        _log.warning("%s has no table of configs and is ignored", _path())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be read and is ignored: %s", _path(), error)
    return {}


def _store(name: str, config: Config) -> None:
    """Add one entry. The file is replaced atomically, so another process never reads half of it."""
    path = _path()
    table = {**_stored(), name: asdict(config)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(table, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
    except OSError as error:
        _log.warning("%s cannot be written; the choice is kept for this process only: %s", path, error)
