"""Block sizes, warps and stages of the Triton kernels: a small table by chip family, with a default for each kernel.

`family(device)` names the chip; `multiprocessors(device)` is the number of multiprocessors that a grid should fill.
Neither waits for the device. Tensors that are not on a GPU (CPU, meta, fake) count as on "sm90", or on the family given
to `with targeting("sm86"):`, which allows kernels to be compiled ahead of time for chips that this machine lacks.

The tables decide by default. With `AFNEXT_AUTOTUNE=1` a kernel that has candidates times them, once for each key of
shapes, and the fastest is kept in a file by GPU, Triton version, kernel and key (`autotune`).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import cache

import torch

from . import autotune
from .chips import CHIPS
from .compilation import is_collecting
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
    return _family(_index(device)) if autotune.has_chip(device) else DEFAULT_FAMILY


def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors (compute units): the chip's own count, or its family's typical one."""
    if _target.get() is None and autotune.has_chip(device):
        return _multiprocessors(_index(device))
    return CHIPS[family(device)].multiprocessors


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
        here = _target.get() is None and autotune.has_chip(device)
        if launch is None or not self.candidates or not (here and autotune.wanted()):
            return listed
        return _fastest(autotune.entry_name(device, self.kernel, key), (listed, *self.candidates), launch, device)


_winners: dict[str, Config] = {}


def _fastest(
    name: str, candidates: Sequence[Config], launch: Callable[[Config], object], device: torch.device
) -> Config:
    """The fastest of some configs; the first of them while nothing can be timed, if nothing was chosen before.

    While kernels are collected, those of all configs are, as timing will need them.
    """
    if name not in _winners:
        stored = autotune.stored().get(name)
        known = next((config for config in candidates if asdict(config) == stored), None)
        if known is None and is_collecting():
            for config in candidates:
                launch(config)
        if known is None and not autotune.may_time(device):
            return candidates[0]
        _winners[name] = known or _timed(name, candidates, launch)
    return _winners[name]


def _timed(name: str, candidates: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    times: dict[int, float] = {}
    for i, config in enumerate(candidates):
        try:
            times[i] = autotune.milliseconds(lambda config=config: launch(config))  # type: ignore[misc]
        except triton.runtime.errors.OutOfResources as error:
            _log.info("%s: %s does not fit: %s", name, config, error)
    if not times:
        raise BackendError(f"{name}: none of {len(candidates)} configs fits this GPU")
    winner = candidates[min(times, key=times.__getitem__)]
    _log.info("%s: %s is the fastest of %d", name, winner, len(times))
    autotune.store(name, asdict(winner))
    return winner
