"""The rule that decides which implementation of an operation runs.

Every operation registers its implementations under a backend's name. The backend follows the device of the tensors
(CPU: native, then torch; CUDA or HIP: triton, then torch) unless one is forced for A/B runs, with the environment
variable `AFNEXT_BACKEND` or, with precedence, `with kernels.backend("reference"):`. The variable may also name single
operations, as in `AFNEXT_BACKEND=attention=torch,rms_norm=triton`, beside or instead of a backend for all, and several
backends of one operation, best first: `attention=cudnn+triton`. `flash_attn` and `cudnn` run only where they are named,
or where `AFNEXT_AUTOTUNE=1` times the backends of an operation and they are faster (`fastest.py`).
An implementation may cover only some arguments; for others the next in order runs. Forced backends are never replaced:
BackendError is raised if an operation has none of them, or none covers the arguments. Which implementation runs, and
why another was skipped, is logged once, at INFO.

Inside `with row_invariant():` operations that declare their rows pass them to an implementation in groups in which it
computes every row alike; see `row_groups.py`.
"""

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

import torch

from . import autotune, fastest
from .device_state import launching, runs_triton
from .errors import BackendError
from .native import AVAILABLE as NATIVE_AVAILABLE
from .row_groups import Groups, in_groups, is_row_invariant, one_row
from .triton_language import AVAILABLE as TRITON_AVAILABLE

LIBRARIES = ("flash_attn", "cudnn")
BACKENDS = ("triton", "native", "torch", "reference", *LIBRARIES)
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


def backend_here() -> str | None:
    """The backend that a surrounding `with backend(...)` forces, or None.

    Another thread or process must force this backend again, but not that of `AFNEXT_BACKEND`, which it inherits:
    forcing it there would override the variable's choices for single operations.
    """
    return _forced.get()


def forced_backend(operation: str = "") -> str | None:
    """The backend forced by `backend(...)` or `AFNEXT_BACKEND`, for all operations or for the one that is named.

    The first, if several are forced; None when the device decides. Raises BackendError for an unknown backend.
    """
    order = _forced_order(operation)
    return order[0] if order else None


def _forced_order(operation: str = "") -> tuple[str, ...]:
    """The backends that are forced, best first; none when the device decides."""
    if (name := _forced.get()) is not None:
        return (name,)
    chosen = _chosen_by_environment(os.environ.get("AFNEXT_BACKEND", ""))
    return chosen.get(operation, chosen.get("", ()))


@cache
def _chosen_by_environment(text: str) -> dict[str, tuple[str, ...]]:
    """Backends by operation, best first, those for all others under "". Only single operations may have several."""
    entries = [entry.strip().rpartition("=") for entry in text.split(",") if entry.strip()]
    return {
        operation.strip(): tuple(_checked(name.strip()) for name in (names.split("+") if operation else [names]))
        for operation, _, names in entries
    }


def check_forced_operations() -> None:
    """Raise BackendError if `AFNEXT_BACKEND` names an operation that no module imported so far defines."""
    known = {operation.name for operation in operations()}
    named = _chosen_by_environment(os.environ.get("AFNEXT_BACKEND", "")).keys() - {""}
    if unknown := sorted(named - known):
        raise BackendError(
            f"AFNEXT_BACKEND names unknown operations {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether the torch backend may use functions that torch has for CPUs only."""
    return tensor.device.type == "cpu"


@dataclass(frozen=True)
class Timing:
    """How the backends of an operation are timed, by functions of its arguments. shapes: describes what the fastest
    depends on; example: the arguments to time with; versions: takes a device and returns those of the libraries."""

    shapes: Callable[..., str]
    example: Callable[..., tuple[Any, ...]]
    versions: Callable[[torch.device], tuple[str, ...]]


class Operation(Generic[F]):
    """The implementations of one operation, and the choice among them.

    `reference` is the specification and always registered; the decorator `implementation("torch")` registers another.
    Without Triton, or without the native kernels, their implementations are not registered.
    """

    def __init__(self, name: str, reference: F, rows: tuple[int, ...] = ()):
        """rows: positions of the arguments that have a row for each row of the result, for an operation whose rounding
        of a row may depend on the other rows."""
        self.name = name
        self.implementations: dict[str, F] = {"reference": reference}
        self._rows = rows
        self._misfits: dict[str, Callable[..., str | None]] = {}
        self._groups: dict[str, Callable[..., Groups]] = {}
        self._timing: Timing | None = None
        self._logged: set[tuple[str, str]] = set()
        _operations.add(self)

    def implementation(
        self,
        name: str,
        misfit: Callable[..., str | None] | None = None,
        groups: Callable[..., Groups] | None = None,
    ) -> Callable[[F], F]:
        """Register the decorated function, with the signature of the reference, as this operation's `name`.

        misfit: takes the same arguments and returns None if the implementation covers them, otherwise what it does not
        cover, such as "head_dim 80". It runs at each call, so it should look at shapes and dtypes only.
        groups: takes the same arguments and returns how rows may be grouped inside `row_invariant`; by default each row
        is computed by a separate call.
        """
        _checked(name)

        def register(function: F) -> F:
            if _AVAILABLE.get(name, True):
                self.implementations[name] = function
                if misfit is not None:
                    self._misfits[name] = misfit
                if groups is not None:
                    self._groups[name] = groups
            return function

        return register

    def timed(self, timing: "Timing") -> None:
        """Let `AFNEXT_AUTOTUNE=1` choose the fastest among Triton and the libraries on GPUs."""
        self._timing = timing

    def candidates(self, device: torch.device) -> list[str]:
        """The backends to try on `device`, best first. Raises BackendError if the operation lacks a forced one."""
        forced = _forced_order(self.name)
        for name in forced:
            self._check_forced(name, device)
        if forced:
            return list(forced)
        order = (*_BY_DEVICE.get(device.type, _OTHER_DEVICES), "reference")
        usable = [candidate for candidate in order if candidate in self.implementations]
        if device.type == "cuda" and not runs_triton(device):
            usable = [candidate for candidate in usable if candidate != "triton"]
        return usable

    def _check_forced(self, name: str, device: torch.device) -> None:
        if name not in self.implementations:
            raise BackendError(
                f"the operation {self.name} has no {name} implementation; it has {', '.join(self.implementations)}. "
                "Choose one of those, or unset AFNEXT_BACKEND to let the device decide."
            )
        if name == "native" and device.type != "cpu":
            raise BackendError(f"the native kernels run on the CPU, and {self.name} was given tensors on {device}")
        if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendError(
                f"the Triton kernels run on a GPU, and {self.name} was given tensors on the CPU; unset AFNEXT_BACKEND, "
                "or set TRITON_INTERPRET=1 to interpret them, which is slow"
            )

    def on(self, device: torch.device) -> F:
        """The implementation for tensors on `device`. Raises BackendError when a forced backend lacks one.

        If implementations cover only some arguments, the choice among them is made when the result is called.
        """
        candidates = self.candidates(device)
        timing = self._timing
        if timing is not None and autotune.wanted() and autotune.has_chip(device) and not _forced_order(self.name):
            return cast(F, lambda *args: self._fastest(timing, candidates, device, args)(*args))
        if candidates[0] in self._misfits:
            return cast(F, lambda *args, **options: self._covering(candidates, device, args, options)(*args, **options))
        return self._chosen(candidates[0], device)

    def _fastest(self, timing: "Timing", candidates: list[str], device: torch.device, args: Any) -> F:
        """The fastest of Triton and the libraries that cover these arguments, if there are several."""
        possible = [name for name in candidates if name == "triton"] + [*LIBRARIES]
        usable = [name for name in possible if name in self.implementations and not self._misfit(name, args)]
        if len(usable) < 2:
            return self._covering(candidates, device, args, {})

        def run(name: str) -> object:
            return launching(self.implementations[name], device)(*timing.example(*args))

        shapes, versions = timing.shapes(*args), timing.versions(device)
        return self._chosen(fastest.fastest(self.name, shapes, usable, device, versions, run), device)

    def _misfit(self, name: str, args: Any, options: Any = MappingProxyType({})) -> str | None:
        return self._misfits[name](*args, **options) if name in self._misfits else None

    def _covering(self, candidates: list[str], device: torch.device, args: Any, options: Any) -> F:
        """The first of the candidates that covers these arguments. Raises BackendError if none does."""
        for name in candidates:
            misfit = self._misfit(name, args, options)
            if misfit is None:
                return self._chosen(name, device)
            self._log_once(name, misfit, f"{self.name} on {device.type}: {name} does not cover {misfit}")
        raise BackendError(f"the {candidates[-1]} implementation of {self.name} does not cover {misfit}")

    def _chosen(self, name: str, device: torch.device) -> F:
        self._log_once(device.type, name, f"{self.name} on {device.type} runs on {name}")
        implementation = self.implementations[name]
        function = cast(F, launching(implementation, device)) if device.type == "cuda" else implementation
        if not self._rows or not is_row_invariant():
            return function
        groups = self._groups.get(name, one_row)
        return cast(F, lambda *args: in_groups(function, groups(*args), self._rows, args))

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
