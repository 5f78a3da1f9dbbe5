"""Native calls, recorded once and repeated: what Python and torch do between them then takes no time.

At one token a sequence a decode step of packed weights is some three hundred calls. Finding out what to call and with
which pointers is the same at every step, and takes 7 of 150 ms at full size.

A recording repeats the calls with the pointers and numbers they had. So what the calls read that changes has to be
brought into the same tensors, and all that is computed has to be computed by calls: an operation of torch that is more
than a view or an allocation would not be repeated. `obstacle` names the first such operation.
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

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory that a call needs only while it runs, the same for all that ask for such a shape by that name."""
        if (name, shape) not in self._scratch:
            self._scratch[name, shape] = torch.empty(shape)
        return self._scratch[name, shape]

    def add(self, function: Callable[..., None], values: list[Any], arguments: Sequence[Any]) -> None:
        """Add a call of `function` with `values`, made from `arguments`, whose tensors the recording keeps."""
        self._calls.append((function, values))
        self._kept.append([argument for argument in arguments if isinstance(argument, Tensor)])

    def __len__(self) -> int:
        return len(self._calls)

    def __call__(self) -> None:
        """Make all calls again."""
        for function, values in self._calls:
            function(*values)


class _Watch(TorchDispatchMode):
    """Notes the first operation that a recording would miss."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and keeping torch's compiler out would import it: three quarters of a second."""
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
    """Record the native calls made inside, which are also carried out. Of no use if it ends with an `obstacle`."""
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
    """Uninitialized float32 memory for one call, which calls it `name`."""
    made = _current.get()
    return torch.empty(shape) if made is None else made.scratch(name, *shape)


def widened(weight: Tensor) -> Tensor:
    """A weight in float32. It stays what it is, so that making it is no part of a recording."""
    if weight.dtype == torch.float32:
        return weight
    made = _current.get()
    if made is None:
        return weight.float()
    obstacle = made.obstacle
    result = weight.float()
    made.obstacle = obstacle
    return result
