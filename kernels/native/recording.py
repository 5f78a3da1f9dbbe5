"""Records native calls once and repeats them, which saves the time of Python and torch between the calls.

With one token per sequence, a decode step with packed weights makes about three hundred calls. Choosing the calls and
their pointers is the same work at every step, and takes 7 of 150 ms at full size.

A recording repeats the calls with the same pointers and numbers, except that of threads. So changing inputs have to be
copied into the same tensors, and native calls have to compute everything: an operation of torch other than a view or an
allocation would not be repeated. `obstacle` names the first such operation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")
_current: ContextVar["Recording | None"] = ContextVar("afnext_recording", default=None)


class Recording:
    """Calls in order, with the tensors that they read and write."""

    def __init__(self) -> None:
        self.obstacle: str | None = None
        self._calls: list[tuple[Callable[..., None], list[Any]]] = []
        self._kept: list[Any] = []
        self._scratch: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._threads = 0  # the last value of every call

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Scratch memory for the duration of a call, shared by all calls with the same name and shape."""
        if (name, shape) not in self._scratch:
            self._scratch[name, shape] = torch.empty(shape)
        return self._scratch[name, shape]

    def add(self, function: Callable[..., None], values: list[Any], arguments: Sequence[Any]) -> None:
        """Add a call of `function` with `values`, converted from `arguments`. Keeps the tensors of these alive."""
        self._calls.append((function, values))
        self._threads = values[-1]
        self._kept.append([argument for argument in arguments if isinstance(argument, Tensor)])

    def __len__(self) -> int:
        return len(self._calls)

    def __call__(self, threads: int | None = None) -> None:
        """Repeat all calls. threads: to use from now on, at most as many as were recorded."""
        if threads is not None and threads != self._threads:
            self._threads = threads
            for _, values in self._calls:
                values[-1] = threads
        for function, values in self._calls:
            function(*values)


class _Watch(TorchDispatchMode):
    """Finds the first operation that a recording would not repeat."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing here is compiled, and excluding torch's compiler would import it, which takes 0.75 s."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._recording.obstacle is None and not _repeatable(func, args, result):
            self._recording.obstacle = func.name()
        return result


def _repeatable(func: Any, arguments: Sequence[Any], result: Any) -> bool:
    """Whether nothing was computed: memory was allocated, or all results are views of an argument."""
    if func._schema.is_mutable:
        return False
    if func._schema.name in _ALLOCATIONS:
        return True
    results = result if isinstance(result, (tuple, list)) else (result,)
    storages = {argument.untyped_storage().data_ptr() for argument in arguments if isinstance(argument, Tensor)}
    return all(isinstance(one, Tensor) and one.untyped_storage().data_ptr() in storages for one in results)


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the native calls in the block, which also run. The recording is unusable if it has an `obstacle`."""
    made = Recording()
    token = _current.set(made)
    try:
        with _Watch(made):
            yield made
    finally:
        _current.reset(token)


def current() -> Recording | None:
    """The recording in progress, if any."""
    return _current.get()


def scratch(name: str, *shape: int) -> Tensor:
    """Uninitialized float32 scratch memory called `name`, for one call."""
    made = _current.get()
    return torch.empty(shape) if made is None else made.scratch(name, *shape)


def widened(weight: Tensor) -> Tensor:
    """A weight in float32. Weights do not change, so the conversion is not part of a recording."""
    if weight.dtype == torch.float32:
        return weight
    made = _current.get()
    if made is None:
        return weight.float()
    obstacle = made.obstacle
    result = weight.float()
    made.obstacle = obstacle
    return result
