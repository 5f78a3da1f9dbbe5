"""Compiles kernels before their first launch, several at a time.

Triton compiles a kernel when it is first launched, while the launching thread waits. `collecting` runs code whose
launches only collect the kernels that are not compiled yet, and `compile_all` compiles these in threads: most of the
time goes to LLVM and to the assembler, which run without Python's lock. Triton keeps the results in memory and on disk.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .cpus import usable_cpus
from .triton_language import AVAILABLE, triton

_UNINITIALIZED = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)
_Mode: Any = triton.AsyncCompileMode if AVAILABLE else object

_collecting: ContextVar[bool] = ContextVar("afnext_collecting", default=False)
_log = logging.getLogger("afnext.kernels")


class Uncompiled:
    """The entry of a kernel in Triton's cache until it is compiled.

    While kernels are collected, its launches do nothing. Otherwise, such as in another thread, it is compiled first.
    """

    def __init__(self, compile: Callable[[], Any], store: Callable[[Any], None]):
        """compile: compiles the kernel; store: replaces this entry by the compiled kernel."""
        self._compile = compile
        self._store = store
        self._kernel: Any = None

    def compiled(self) -> Any:
        """The compiled kernel. Raises what the compiler raises."""
        if self._kernel is None:
            self._kernel = self._compile()
            self._store(self._kernel)
        return self._kernel

    @property
    def name(self) -> str:
        """File and function of the kernel: attention._kernel."""
        # Triton passes no name, only a function that refers to the source.
        source = inspect.getclosurevars(self._compile).nonlocals["src"]
        return f"{source.fn.__module__.rpartition('.')[2]}.{source.fn.__name__}"

    def __getattr__(self, name: str) -> Any:
        return _nothing if is_collecting() else getattr(self.compiled(), name)


def _nothing(*_arguments: Any) -> None:
    """In place of the methods of a compiled kernel."""


class _Collecting(_Mode):  # type: ignore[misc]
    """Makes Triton pass the kernels that it would compile."""

    def __init__(self) -> None:
        super().__init__(executor=None)
        self.kernels: list[Uncompiled] = []

    def submit(self, _key: Any, compile: Callable[[], Any], store: Callable[[Any], None], *_others: Any) -> Uncompiled:
        """Called by Triton, once for each kernel and specialization."""
        self.kernels.append(Uncompiled(compile, store))
        return self.kernels[-1]


class _ZeroedMemory(TorchFunctionMode):
    """Zeros in place of uninitialized memory, since what a kernel would have written may be used as an index."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result.zero_() if function in _UNINITIALIZED else result


def is_collecting() -> bool:
    """Whether this thread's launches only collect kernels."""
    return _collecting.get()


@contextmanager
def collecting() -> Iterator[list[Uncompiled]]:
    """Collect the kernels that this thread launches in the `with` block and that are not compiled.

    They are neither compiled nor launched, and their results are zeros. Compiled kernels are launched as usual, as are
    torch's. Requires Triton.
    """
    token = _collecting.set(True)
    try:
        with _Collecting() as mode, _ZeroedMemory():
            yield mode.kernels
    finally:
        _collecting.reset(token)


def compile_all(
    kernels: Sequence[Uncompiled], progress: Callable[[int, int], None], *, threads: int | None = None
) -> None:
    """Compile kernels that `collecting` found, or load them from Triton's cache on disk.

    progress: called with (done, total); threads: by default one per core that this process may use. If a kernel does
    not compile, its name is logged, the rest is given up, and what the compiler raised is raised.
    """
    if not kernels:
        return
    progress(0, len(kernels))
    with ThreadPoolExecutor(threads or usable_cpus().threads, thread_name_prefix="afnext-compile") as pool:
        running = {pool.submit(kernel.compiled): kernel for kernel in kernels}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                if future.exception() is not None:
                    _log.error("the kernel %s does not compile", running[future].name)
                future.result()
                progress(done, len(kernels))
        finally:
            pool.shutdown(cancel_futures=True)
