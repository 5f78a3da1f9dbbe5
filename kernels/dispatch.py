"""The one rule that decides which implementation of an operation runs.

Every operation registers its implementations under a backend's name. The backend follows the device of the tensors
(CPU: native, then torch; CUDA or HIP: triton, then torch) unless one is forced for A/B runs, with the environment
variable `AFNEXT_BACKEND` or, with precedence, `with kernels.backend("reference"):`. A forced backend is never replaced
silently: an operation without it raises. Which implementation runs is logged once per operation and device, at INFO.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

from .errors import BackendError
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


class Operation(Generic[F]):
    """The implementations of one operation, and the choice among them.

    `reference` is the specification and is always there; `implementation("torch")` registers another as a decorator.
    Where Triton is not installed, its implementations are not registered.
    """

    def __init__(self, name: str, reference: F):
        self.name = name
        self.implementations: dict[str, F] = {"reference": reference}
        self._logged: set[tuple[str, str]] = set()

    def implementation(self, name: str) -> Callable[[F], F]:
        """Register the decorated function, with the signature of the reference, as this operation's `name`."""
        _checked(name)

        def register(function: F) -> F:
            if name != "triton" or TRITON_AVAILABLE:
                self.implementations[name] = function
            return function

        return register

    def on(self, device: torch.device) -> F:
        """The implementation for tensors on `device`. Raises BackendError when a forced backend lacks one."""
        name = forced_backend()
        if name is None:
            order = (*_BY_DEVICE.get(device.type, _OTHER_DEVICES), "reference")
            name = next(candidate for candidate in order if candidate in self.implementations)
        elif name not in self.implementations:
            raise BackendError(
                f"the operation {self.name} has no {name} implementation; it has {', '.join(self.implementations)}. "
                "Choose one of those, or unset AFNEXT_BACKEND to let the device decide."
            )
        if (device.type, name) not in self._logged:
            self._logged.add((device.type, name))
            _log.info("%s on %s runs on %s", self.name, device.type, name)
        return self.implementations[name]


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name
