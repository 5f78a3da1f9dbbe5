"""The one rule that decides which implementation of an operation runs.

Every operation registers its implementations under a backend's name. The backend follows the device of the tensors
(CPU: native, then torch; CUDA or HIP: triton, then torch) unless one is forced for A/B runs, with the environment
variable `AFNEXT_BACKEND` or, with precedence, `with kernels.backend("reference"):`. An implementation may cover only
some arguments; the others go to the next in order. A forced backend is never replaced: an operation without it, or
arguments that it does not cover, raise. Which implementation runs, and why one is passed over, is logged once, at INFO.
"""

import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from .errors import BackendError
from .native import AVAILABLE as NATIVE_AVAILABLE
from .triton_language import AVAILABLE as TRITON_AVAILABLE

BACKENDS = ("triton", "native", "torch", "reference")
_BY_DEVICE = {"cuda": ("triton", "torch"), "cpu": ("native", "torch")}
_OTHER_DEVICES = ("torch",)

_forced: ContextVar[str | None] = ContextVar("afnext_backend", default=None)
_log = logging.getLogger("afnext.kernels")

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the backend `name` (one of `BACKENDS`) for the operations called inside the `with` block."""
    token = _forced.set(_checked(name))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend forced by `backend(...)` or `AFNEXT_BACKEND`, or None when the device decides."""
    name = _forced.get() or os.environ.get("AFNEXT_BACKEND")
    return _checked(name) if name else None


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on `device`, so that host clocks around it tell the truth. No-op on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on `device`; of a CPU's memory what the system and the container leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"^MemAvailable:\s*(\d+) kB$", _contents("/proc/meminfo"), re.MULTILINE)
    if available:
        free = 1024 * int(available[1])
    limit = _contents("/sys/fs/cgroup/memory.max").strip()
    return min(free, int(limit)) if limit.isdecimal() else free


def _contents(path: str) -> str:
    """The text of a file of the system, empty where there is none."""
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether the torch backend may use what torch has for CPUs alone."""
    return tensor.device.type == "cpu"


class Operation(Generic[F]):
    """The implementations of one operation, and the choice among them.

    `reference` is the specification and is always there; `implementation("torch")` registers another as a decorator.
    Where Triton is not installed, or the native kernels are not built, theirs are not registered.
    """

    def __init__(self, name: str, reference: F):
        self.name = name
        self.implementations: dict[str, F] = {"reference": reference}
        self._misfits: dict[str, Callable[..., str | None]] = {}
        self._logged: set[tuple[str, str]] = set()
        _operations.add(self)

    def implementation(self, name: str, misfit: Callable[..., str | None] | None = None) -> Callable[[F], F]:
        """Register the decorated function, with the signature of the reference, as this operation's `name`.

        misfit: takes the same arguments and returns None where the implementation covers them, and otherwise what it
        does not cover, such as "head_dim 80". It is asked at each call, so it should look at shapes and dtypes only.
        """
        _checked(name)

        def register(function: F) -> F:
            if _AVAILABLE.get(name, True):
                self.implementations[name] = function
                if misfit is not None:
                    self._misfits[name] = misfit
            return function

        return register

    def candidates(self, device: torch.device) -> list[str]:
        """The backends to try on `device`, best first. Raises BackendError when a forced one is not there."""
        name = forced_backend()
        if name is None:
            order = (*_BY_DEVICE.get(device.type, _OTHER_DEVICES), "reference")
            return [candidate for candidate in order if candidate in self.implementations]
        if name not in self.implementations:
            raise BackendError(
                f"the operation {self.name} has no {name} implementation; it has {', '.join(self.implementations)}. "
                "Choose one of those, or unset AFNEXT_BACKEND to let the device decide."
            )
        if name == "native" and device.type != "cpu":
            raise BackendError(f"the native kernels run on the CPU, and {self.name} was given tensors on {device}")
        return [name]

    def on(self, device: torch.device) -> F:
        """The implementation for tensors on `device`. Raises BackendError when a forced backend lacks one.

        The choice among implementations that cover only some arguments is made when the result is called.
        """
        candidates = self.candidates(device)
        if candidates[0] in self._misfits:
            return cast(F, lambda *args, **options: self._covering(candidates, device, args, options)(*args, **options))
        return self._chosen(candidates[0], device)

    def _covering(self, candidates: list[str], device: torch.device, args: Any, options: Any) -> F:
        """The first of the candidates that covers these arguments. Raises BackendError if none does."""
        for name in candidates:
            misfit = self._misfits[name](*args, **options) if name in self._misfits else None
            if misfit is None:
                return self._chosen(name, device)
            self._log_once(name, misfit, f"{self.name} on {device.type}: {name} does not cover {misfit}")
        raise BackendError(f"the {candidates[-1]} implementation of {self.name} does not cover {misfit}")

    def _chosen(self, name: str, device: torch.device) -> F:
        self._log_once(device.type, name, f"{self.name} on {device.type} runs on {name}")
        return self.implementations[name]

    def _log_once(self, *key_and_message: str) -> None:
        *key, message = key_and_message
        if tuple(key) not in self._logged:
            self._logged.add((key[0], key[1]))
            _log.info(message)


_AVAILABLE = {"triton": TRITON_AVAILABLE, "native": NATIVE_AVAILABLE}
_operations: weakref.WeakSet[Operation[Any]] = weakref.WeakSet()


def operations() -> list[Operation[Any]]:
    """Every operation of the modules imported so far, by name."""
    return sorted(_operations, key=lambda operation: operation.name)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name
