"""A user's kernel: found by file and name or by entry point, called like the public operation.

A candidate has the signature of the operation's public function and gets keyword arguments; omitted arguments are not
passed. It returns new tensors, and writes into arguments only where the operation does.
"""

import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.dispatch import Operation
from ...kernels.errors import AfnextError
from ...kernels.packed_weight import Packed
from .guarded import guarded
from .inputs import parts_of
from .specs import Spec

GROUP = "afnext.kernels"


class CandidateError(AfnextError):
    """A candidate cannot be found or called."""


def load_candidate(text: str) -> Callable[..., Any]:
    """The function that `text` names: "my_kernel.py:fn", or an entry point of the group `afnext.kernels`.

    Raises CandidateError for missing files, functions and entry points; errors of the import propagate.
    """
    path, colon, name = text.rpartition(":")
    if not colon:
        found = [point for point in importlib.metadata.entry_points(group=GROUP) if point.name == text]
        if not found:
            known = ", ".join(sorted(point.name for point in importlib.metadata.entry_points(group=GROUP))) or "none"
            raise CandidateError(
                f"{text!r} is neither FILE.py:FUNCTION nor an entry point of the group {GROUP}; there are: {known}"
            )
        return _function(found[0].load(), text)
    file = Path(path).resolve()
    if not file.is_file():
        raise CandidateError(f"{path} is not a file; name a candidate as FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location("afnext_candidate", file)
    if spec is None or spec.loader is None:
        raise CandidateError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.parent))  # for imports of modules in the same folder
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise CandidateError(f"{path} has no {name!r}")
    return _function(getattr(module, name), text)


def _function(value: Any, text: str) -> Callable[..., Any]:
    if not callable(value):
        raise CandidateError(f"{text} is {type(value).__name__}, not a function")
    return value


def check_signature(function: Callable[..., Any], spec: Spec, arguments: dict[str, Any]) -> None:
    """Raise CandidateError unless `function` can be called with these arguments."""
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as problem:
        expected = inspect.signature(spec.function)
        raise CandidateError(
            f"the candidate cannot be called like {spec.name}{expected} ({problem}); it gets the arguments "
            f"{', '.join(arguments)} by name"
        ) from None


def within_guards(function: Callable[..., Any], spec: Spec) -> Callable[..., Any]:
    """`function` on copies of CPU tensors before a guard page: an access past the end crashes the process."""

    def call(**arguments: Any) -> Any:
        copies = {name: _copied(value) for name, value in arguments.items()}
        returned = function(**copies)
        for name, copy in copies.items():
            for tensor, part in zip(parts_of(arguments[name]), parts_of(copy), strict=True):
                tensor.copy_(part)
        return returned

    return call


def _copied(value: Any) -> Any:
    if isinstance(value, Packed):
        return Packed(*map(_copied, value))
    return guarded(value) if isinstance(value, Tensor) and value.numel() and value.device.type == "cpu" else value


def implementation(function: Callable[..., Any], spec: Spec) -> Callable[..., Any]:
    """`function` with the signature of the operation's reference, as the operation calls its implementations.

    Arguments that are None or the public function's defaults are not passed.
    """
    names = list(inspect.signature(spec.operation.implementations["reference"]).parameters)
    defaults = {name: p.default for name, p in inspect.signature(spec.function).parameters.items()}

    def call(*args: Any, **options: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | options
        passed = {name: value for name, value in arguments.items() if not _is_default(name, value)}
        return function(**passed)

    def _is_default(name: str, value: Any) -> bool:
        if value is None:
            return True
        # The public functions of attention replace a scale that is not given.
        return name == "scale" or (not isinstance(value, Tensor) and name in defaults and value == defaults[name])

    return call


@contextmanager
def swapped_in(function: Callable[..., Any], spec: Spec) -> Iterator[list[int]]:
    """Every call of the operation inside the block runs `function`; yields a list whose length is their number."""
    target, real_on = spec.operation, Operation.on
    calls: list[int] = []
    candidate = implementation(function, spec)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return candidate(*args, **options)

    def on(operation: Operation[Any], device: torch.device) -> Callable[..., Any]:
        return counted if operation is target else real_on(operation, device)

    Operation.on = on  # type: ignore[method-assign,assignment]
    try:
        yield calls
    finally:
        Operation.on = real_on  # type: ignore[method-assign]
