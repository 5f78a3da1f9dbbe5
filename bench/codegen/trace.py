"""The kernels that host code launches, recorded on a machine without a GPU.

Tensors on torch's `meta` device have shapes and no data. Host code runs on them unchanged: Triton itself binds and
specializes each launch (dtypes, divisibility by 16, arguments equal to 1), which is then recorded instead of compiled.
So the recording has exactly what would be compiled for a GPU.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ...kernels.dispatch import Operation
from ...kernels.packed_weight import Packed
from ..core.work import Work, distinct_bytes, work_of

# The address of meta tensors for Triton's test of alignment: allocators align to more than 16 bytes.
_BASE_ADDRESS = 1 << 30
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Specialization:
    """What determines the machine code of a kernel, apart from the chip; the arguments of Triton's compiler."""

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]

    @cached_property
    def digest(self) -> str:
        """A hash of the source of the kernel and of the functions it calls, and of everything else that is compiled
        in."""
        constants = {path: getattr(value, "cache_key", value) for path, value in self.constexprs.items()}
        parts = (self.kernel.cache_key, self.signature, constants, self.attributes, self.options)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def constants(self) -> dict[str, Any]:
        """The constexpr parameters by name, without those that are absent (None)."""
        names = self.kernel.arg_names
        named = {names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}
        return {name: _plain(value) for name, value in named.items() if value is not None}


def _plain(value: Any) -> Any:
    """As a JSON value: a number or a text unchanged, a function or a dtype by its name."""
    return value if isinstance(value, int | float | str) else getattr(value, "__name__", str(value))


@dataclass(frozen=True)
class Launch:
    """One launch. operation: its operation, "" for none; arguments: that operation's tensors, or without one the
    kernel's; bytes: least bytes of the launch; work: of the whole operation; index: number of earlier launches of this
    kernel in the same call."""

    specialization: Specialization
    grid: tuple[int, ...]
    operation: str
    arguments: tuple[str, ...]
    bytes: int
    work: Work
    index: int

    @property
    def kernel(self) -> str:
        """File and function of the kernel: attention._kernel."""
        kernel = self.specialization.kernel
        return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


@dataclass
class _Call:
    """A call of an operation in progress."""

    operation: str
    arguments: Mapping[str, Any]
    work: Work
    launched: list[JITFunction]
    delegates: bool = False  # to other operations


@dataclass(frozen=True)
class Recording:
    """launches: in order; torch_operations: operations that launched no Triton kernel of afnext."""

    launches: list[Launch] = field(default_factory=list)
    torch_operations: set[str] = field(default_factory=set)


@contextmanager
def recorded_launches(context: int = 0) -> Iterator[Recording]:
    """Collect the Triton launches of the `with` block instead of running them.

    Operations choose their implementation as on a CUDA device. context: tokens in each sequence of the KV cache, the
    new ones included, which meta tensors do not have.
    """
    recording = Recording()
    calls: list[_Call] = []
    real_run, real_on = JITFunction.run, Operation.on

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        recording.launches.append(_launch(kernel, args, options, grid, calls[-1] if calls else None))

    def on(operation: Operation[Any], _device: torch.device) -> Callable[..., Any]:
        function = real_on(operation, torch.device("cuda"))
        signature = inspect.signature(operation.implementations["reference"])

        def called(*args: Any, **options: Any) -> Any:
            arguments = signature.bind(*args, **options).arguments
            call = _Call(operation.name, arguments, work_of(operation.name, arguments, context), [])
            calls.append(call)
            try:
                result = function(*args, **options)
            finally:
                calls.pop()
            if calls:
                calls[-1].delegates = True
            if not call.launched and not call.delegates:
                recording.torch_operations.add(operation.name)
            return result

        return called

    JITFunction.run, Operation.on = run, on  # type: ignore[method-assign,assignment]
    try:
        yield recording
    finally:
        JITFunction.run, Operation.on = real_run, real_on  # type: ignore[method-assign]


class _Pointer:
    """A meta tensor in the form that Triton's specialization needs: a dtype and an address."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.dtype, self.shape, self.device = tensor.dtype, tensor.shape, tensor.device

    def data_ptr(self) -> int:
        return _BASE_ADDRESS + int(self.tensor.storage_offset()) * self.tensor.element_size()

    def stride(self, *dimension: int) -> Any:
        return self.tensor.stride(*dimension)

    def element_size(self) -> int:
        return self.tensor.element_size()


def _launch(
    kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], grid: Any, call: _Call | None
) -> Launch:
    backend, bind = _binder(kernel)
    args = tuple(map(_pointed, args))
    options = {name: _pointed(value) for name, value in options.items()}
    options.setdefault("debug", False)
    bound, specialization, options = bind(*args, **options)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    chosen = {name: getattr(parsed, name) for name in _OPTIONS if getattr(parsed, name, None) is not None}
    tensors = [tensor for value in bound.values() for tensor in _tensors(value)]
    work = call.work if call else Work()
    index = call.launched.count(kernel) if call else 0
    if call:
        call.launched.append(kernel)
    return Launch(
        Specialization(kernel, signature, constexprs, attributes, chosen),
        tuple(int(size) for size in (grid(bound) if callable(grid) else grid)),
        call.operation if call else "",
        tuple(_described(call.arguments if call else bound)),
        distinct_bytes(tensors, call.arguments if call else {}, work.touched),
        work,
        index,
    )


@cache
def _binder(kernel: JITFunction) -> tuple[Any, Callable[..., Any]]:
    # Specialization does not depend on the compute capability.
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _pointed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Pointer(value)
    if isinstance(value, tuple):
        return tuple(map(_pointed, value))
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, _Pointer):
        yield value.tensor
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(getattr(value, "base", None), Tensor):  # a tensor descriptor
        yield value.base


def _described(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        if isinstance(value, Packed):
            yield from _described(value.named(name))
            continue
        for tensor in _tensors(_pointed(value)):
            yield f"{name} {str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}]"
