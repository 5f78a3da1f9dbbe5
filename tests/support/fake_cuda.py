"""NVIDIA GPUs on a machine without any: the runtime's own host code runs on them, and every kernel launch is checked.

A tensor "on" a GPU is one in the host's memory that says so. Torch's operations compute on it as on any other, and the
result is on the same GPU. Dense products and convolutions only give zeros, as they are slow. Triton's kernels are bound
and specialized by Triton itself, but neither compiled nor run: what they would have written stays zero. What is checked
is what a GPU, or its driver, would refuse or get wrong:

- a launch goes to the current device and stream, and each tensor of it is there;
- grids and tensor descriptors are within the driver's limits;
- operations do not mix devices;
- a graph is captured on a stream of its own device, by one thread at a time, and nothing waits meanwhile;
- what a graph reads and writes when it is replayed has not been freed;
- what one stream uses and another has written is ordered by events, and freed no sooner (`fake_streams.py`).

A violation raises `CudaFaultError`, and stays in `FakeCuda.faults`, as the runtime may recover from the exception.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from support.fake_streams import Known, StreamOrder
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from afnext.kernels import configs, device_state
from afnext.runtime.engine.worker import Worker

CPU = torch.device("cpu")
_MEMORY = 80 << 30
_MULTIPROCESSORS = 132
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)
_MOST_BOX = 256  # elements of one side of a tile that a tensor descriptor fetches
_UNINITIALIZED = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)
_WAITING = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu")
_ON_THE_HOST = ("__get__", "__set__", "__len__", "size", "dim", "numel", "element_size", "stride")
_BETWEEN_DEVICES = ("to", "copy_", "cpu", "cuda", "__getitem__", "__setitem__", "index_put_", "type")


class CudaFaultError(AssertionError):
    """Something that a GPU or its driver would refuse, or do wrongly."""


class GpuTensor(Tensor):
    """A tensor in the host's memory that says it is in a GPU's."""

    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The GPU that it is on."""
        return torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Whether it is on a GPU."""
        return True


class Stream:
    """A stream of one GPU."""

    _handles = iter(range(1, 1_000_000))

    def __init__(self, cuda: "FakeCuda", device: Any, *, default: bool = False):
        self._order = cuda.order
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self.device_index: int = self.device.index
        self.cuda_stream = 0 if default else next(self._handles)
        self.key = self.device_index, self.cuda_stream
        self.graph: Graph | None = None

    def wait_event(self, event: "Event") -> None:
        """Later work waits for an event."""
        self._order.wait(self.key, event.reached)

    def wait_stream(self, stream: "Stream") -> None:
        """Later work waits for what is queued in a stream."""
        self._order.wait(self.key, self._order.until_now(stream.key))

    def record_event(self) -> "Event":
        """An event after what is queued."""
        event = Event(self._order)
        event.record(self)
        return event


class Event:
    """A point in a stream, reached at once."""

    def __init__(self, order: StreamOrder):
        self._order = order
        self.reached: Known = {}

    def synchronize(self) -> None:
        """The host waits for it."""
        self._order.host_waits(self.reached)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds until another event."""
        return 1.0

    def record(self, stream: Stream | None = None) -> None:
        """Put it after what is queued in a stream."""
        self.reached = self._order.until_now((stream or torch.cuda.current_stream()).key)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel. captured: into a graph, instead of at once."""

    kernel: str
    device: int
    stream: int
    grid: tuple[int, int, int]
    captured: bool


@dataclass
class _Recorded:
    """What a graph repeats. outside: the memory that it uses and does not own, by the operation that uses it."""

    stream: Stream
    pool: object
    owned: set[StorageWeakRef] = field(default_factory=set)
    outside: dict[StorageWeakRef, str] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    broken: bool = False


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self, cuda: "FakeCuda"):
        self._cuda = cuda
        self.recorded: _Recorded | None = None

    def capture_begin(self, pool: object = None, **_modes: object) -> None:
        """Record what this thread puts into the current stream, until `capture_end`."""
        stream = self._cuda.current_stream()
        if stream.cuda_stream == 0:
            self._cuda.fault("a graph is captured on the default stream")
        if stream.graph is not None or any(graph.pool == pool for graph in self._cuda.capturing.values()):
            self._cuda.fault("a stream or a pool of memory serves two captures at a time")
        stream.graph = self
        self.recorded = self._cuda.capturing[threading.get_ident()] = _Recorded(stream, pool)

    def capture_end(self) -> None:
        """End the recording. Raises RuntimeError if something failed meanwhile."""
        assert self.recorded is not None
        self.recorded.stream.graph = None
        del self._cuda.capturing[threading.get_ident()]
        if self.recorded.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if self._cuda.current_stream() is not self.recorded.stream:
            self._cuda.fault("a capture ends on another stream than it began on")
        self._cuda.graphs.append(self)

    def replay(self) -> None:
        """Repeat what was recorded, which has to find the memory that it uses."""
        assert self.recorded is not None
        for storage, user in self.recorded.outside.items():
            if storage.expired():
                self._cuda.fault(f"a graph is replayed whose {user} uses memory that was freed")
        stream = self._cuda.current_stream(self.recorded.stream.device).key
        self._cuda.order.use("a graph", stream, self.recorded.outside)
        self._cuda.order.take("a graph", stream, self.recorded.pool)
        self._cuda.replays += 1


class FakeCuda:
    """GPUs like an H100, from the beginning to the end of the test that it is given the monkeypatch of.

    launches: all so far, those that graphs repeat once, when they were captured; compiled: the kernels for which
    Triton's compiler has been called, and with what; compiling: called before each with the kernel's name, may raise;
    graphs: captured; replays: their number; waits: operations for which the host waits until all queued work is done;
    faults: what would not have worked on a GPU. fail_captures: how many of the next captures fail, for want of memory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int = 2, capability: tuple[int, int] = (9, 0)):
        self.launches: list[Launch] = []
        self.compiled: list[str] = []
        self.compiling: Callable[[str], object] = lambda name: None
        self.graphs: list[Graph] = []
        self.replays = 0
        self.waits: list[str] = []
        self.faults: list[str] = []
        self.fail_captures = 0
        self.capturing: dict[int, _Recorded] = {}
        self.order = StreamOrder(self.fault)
        self._gpus = gpus
        self._capability = capability
        self._here = threading.local()
        self._default_streams = [Stream(self, index, default=True) for index in range(gpus)]
        self._kernels: set[JITFunction[Any]] = set()
        self._install(monkeypatch)

    def fault(self, what: str) -> None:
        """Note a fault, and raise it."""
        self.faults.append(what)
        raise CudaFaultError(what)

    # What stands in for torch.cuda.

    def current_device(self) -> int:
        """The device of this thread, at first 0."""
        return getattr(self._here, "device", 0)

    def set_device(self, device: Any) -> None:
        """Make a GPU the device of this thread."""
        self._here.device = self._index(device)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """A GPU as the device of this thread, inside a `with` block."""
        before = self.current_device()
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    def current_stream(self, device: Any = None) -> Stream:
        """This thread's stream of a GPU."""
        index = self._index(device)
        streams: dict[int, Stream] = self._here.__dict__.setdefault("streams", {})
        return streams.get(index, self._default_streams[index])

    def set_stream(self, stream: Stream) -> None:
        """Make a stream this thread's of its GPU, and its GPU this thread's, as torch does."""
        self.set_device(stream.device_index)
        self._here.__dict__.setdefault("streams", {})[stream.device_index] = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """A stream as this thread's, inside a `with` block."""
        source, destination = self.current_stream(), self.current_stream(stream.device_index)
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(destination)
            self.set_stream(source)

    def synchronize(self, device: Any = None) -> None:
        """Wait for a GPU, which a capture in this thread does not allow."""
        self._may_wait("synchronize", device)

    def _index(self, device: Any) -> int:
        if device is None:
            return self.current_device()
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.current_device() if index is None else index

    def _install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(multi_processor_count=_MULTIPROCESSORS, total_memory=_MEMORY, name="fake H100")
        pools = iter(range(1, 1_000_000))
        stands_in: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: self._gpus,
            "current_device": self.current_device,
            "set_device": self.set_device,
            "device": self.device,
            "current_stream": self.current_stream,
            "default_stream": lambda device=None: self._default_streams[self._index(device)],
            "set_stream": self.set_stream,
            "stream": self.stream,
            "Stream": lambda device=None, **_: Stream(self, self._index(device)),
            "Event": lambda **_: Event(self.order),
            "CUDAGraph": lambda **_: Graph(self),
            "graph_pool_handle": lambda: next(pools),
            "is_current_stream_capturing": lambda: threading.get_ident() in self.capturing,
            "synchronize": self.synchronize,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "get_device_capability": lambda device=None: self._capability,
            "get_device_properties": lambda device=None: properties,
            "get_device_name": lambda device=None: properties.name,
        }
        for name, value in stands_in.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)  # the class itself is torch's own
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(Tensor, "record_stream", self._record_stream)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(driver, "_active", _Driver(self))
        monkeypatch.setattr(triton.compiler, "compile", self._compiled)
        compile_kernel, run = JITFunction._do_compile, Worker._run

        def compile_noted(kernel: "JITFunction[Any]", *arguments: Any, **options: Any) -> Any:
            self._kernels.add(kernel)
            return compile_kernel(kernel, *arguments, **options)

        monkeypatch.setattr(JITFunction, "_do_compile", compile_noted)

        def run_with_gpus(worker: Worker, *arguments: Any) -> None:
            with self.in_this_thread():
                run(worker, *arguments)

        monkeypatch.setattr(Worker, "_run", run_with_gpus)

    @property
    def _record_stream(self) -> Callable[[Tensor, Stream], None]:
        return lambda tensor, stream: self.order.keep(StorageWeakRef(tensor.untyped_storage()), stream.key)

    @contextmanager
    def active(self) -> Iterator["FakeCuda"]:
        """The GPUs in this thread; those of engines have them anyway. Fails at the end if there were faults."""
        answered_once = (device_state.capability, configs._family, configs._multiprocessors)
        for answer in answered_once:
            answer.cache_clear()
        try:
            with self.in_this_thread():
                yield self
        finally:
            for answer in answered_once:
                answer.cache_clear()
            for kernel in self._kernels:
                kernel.device_caches.clear()
        assert not self.faults, self.faults

    def in_this_thread(self) -> AbstractContextManager[Any]:
        """The GPUs in this thread, while they are active in another."""
        return _OnGpus(self)

    # Launches.

    def _compiled(self, source: ASTSource, options: Any = None, **_: Any) -> "_Kernel":
        kernel = source.fn
        self.compiling(kernel.__name__)
        self.compiled.append(f"{kernel.__name__} {source.hash()} {sorted(options.items())}")
        return _Kernel(self, f"{kernel.__module__}.{kernel.__name__}")

    def launched(self, kernel: str, grid: tuple[int, int, int], stream: int, arguments: Iterable[Any]) -> None:
        """Check a launch, and note it."""
        if any(not 0 <= size <= most for size, most in zip(grid, _MOST_BLOCKS, strict=True)):
            self.fault(f"{kernel} is launched on a grid of {grid}")
        current = self.current_device()
        tensors = []
        for value in arguments:
            if isinstance(value, TensorDescriptor):
                self._check_descriptor(kernel, value)
                value = value.base
            if isinstance(value, Tensor):
                tensors.append(value)
        for tensor in tensors:
            if tensor.device.type != "cuda" or tensor.device.index != current:
                self.fault(f"{kernel} is launched on cuda:{current} with a tensor on {tensor.device}")
        recorded = self.use(kernel, current, tensors)
        launch = Launch(kernel, current, stream, grid, recorded is not None)
        self.launches.append(launch)
        if recorded is not None:
            recorded.launches.append(launch)

    def _check_descriptor(self, kernel: str, tile: TensorDescriptor) -> None:
        """The rules of `cuTensorMapEncodeTiled` that Triton does not check itself."""
        size = tile.base.element_size()
        row = tile.block_shape[-1] * size
        if any(not 0 < side <= _MOST_BOX for side in tile.block_shape[:-1]) or row % 16:
            self.fault(f"{kernel} is given a descriptor of tiles {tile.block_shape}")
        if any(step * size >= 1 << 40 for step in tile.strides[:-1]):
            self.fault(f"{kernel} is given a descriptor with steps of {tile.strides}")

    # Work of any kind.

    def use(self, user: str, device: int, tensors: Iterable[Tensor]) -> _Recorded | None:
        """Note that something on `device` uses tensors. Returns the graph that it is recorded in, if any."""
        recorded = self.capturing.get(threading.get_ident())
        if recorded is None:
            storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
            self.order.use(user, self.current_stream(device).key, storages)
            return None
        if self.fail_captures:
            self.fail_captures -= 1
            recorded.broken = True
        if recorded.broken:
            raise torch.OutOfMemoryError("CUDA out of memory (while capturing)")
        if self.current_stream(device) is not recorded.stream:
            self.fault(f"{user} on cuda:{device} is not captured, as the capture is on {recorded.stream.device}")
        for tensor in tensors:
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in recorded.owned:
                recorded.outside.setdefault(storage, user)
        return recorded

    def _may_wait(self, what: str, device: Any = None) -> None:
        if threading.get_ident() in self.capturing:
            self.fault(f"{what} waits for the device during a capture")
        self.order.host_waits(self.order.until_now(self.current_stream(device).key))
        self.waits.append(what)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Compute one operation of torch's, on the device that it asks for or that its tensors are on."""
        if function is torch.device:
            return function(*args, **options)
        name = getattr(function, "__name__", str(function))
        tensors = [value for value in _flat((args, tuple(options.values()))) if isinstance(value, Tensor)]
        on_gpus = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
        target = self._asked_for(function, name, args, options)
        if target is None:
            target = on_gpus[0].device if on_gpus else None
        if name in _WAITING and on_gpus:
            self._may_wait(name)
        if name not in _ON_THE_HOST:
            self._check_devices(name, tensors, on_gpus, options)
        if name == "pin_memory":
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if "pin_memory" in options:
            pinned = function(*args, **{**options, "pin_memory": False})
            pinned.pinned = options["pin_memory"]
            return pinned
        args, options = _on_the_host(args), _on_the_host(options)
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("conv1d", "linear") and on_gpus:
                result = args[0].new_zeros(_shape_of_product(*args[:2], **options))
            else:
                result = function(*args, **options)
            if function in _UNINITIALIZED and target is not None and target.type == "cuda":
                result.zero_()
        is_view = bool(on_gpus) and _is_view(name, result, on_gpus)
        if on_gpus and name not in _ON_THE_HOST and (not is_view or threading.get_ident() in self.capturing):
            self.use(name, on_gpus[0].index, on_gpus)
        moved = bool(tensors) and target is not None and name in ("to", "cuda") and tensors[0].device != target
        made_here = function in (torch.tensor, torch.as_tensor) and target is not None and target.type == "cuda"
        if made_here or (moved and not _is_queued(tensors[0], options)):
            self._may_wait(name)
        return self._placed(result, name, target, copy=moved or name == "cpu")

    def _asked_for(
        self, function: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> torch.device | None:
        asked = options.get("device")
        if function is Tensor.to:
            asked = next((value for value in args[1:] if isinstance(value, torch.device | str | Tensor)), asked)
            asked = asked.device if isinstance(asked, Tensor) else asked
        if name in ("cpu", "numpy"):
            asked = CPU
        elif function is Tensor.cuda:
            asked = torch.device("cuda")
        if asked is None:
            return None
        device = torch.device(asked)
        return torch.device("cuda", self._index(device)) if device.type == "cuda" else device

    def _check_devices(
        self, name: str, tensors: list[Tensor], on_gpus: list[GpuTensor], options: dict[str, Any]
    ) -> None:
        devices = {tensor.device for tensor in on_gpus}
        if len(devices) > 1 and name not in ("copy_", "to"):
            self.fault(f"{name} is given tensors on {' and '.join(sorted(map(str, devices)))}")
        elsewhere = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.ndim > 0]
        if on_gpus and elsewhere:
            if name not in _BETWEEN_DEVICES:
                self.fault(f"{name} is given tensors on {on_gpus[0].device} and on the CPU")
            if not _is_queued(elsewhere[0], options):
                self._may_wait(name)

    def _placed(self, result: Any, name: str, target: torch.device | None, *, copy: bool) -> Any:
        if isinstance(result, tuple | list) and not hasattr(result, "_fields") and not isinstance(result, torch.Size):
            return type(result)(self._placed(one, name, target, copy=copy) for one in result)
        if not isinstance(result, Tensor) or isinstance(result, GpuTensor):
            return result
        with torch._C.DisableTorchFunctionSubclass():
            result = result.clone() if copy else result
            if target is None or target.type != "cuda":
                return result
            placed = result.as_subclass(GpuTensor)
        placed.index = target.index
        if name not in _ON_THE_HOST:
            self._note(name, placed)
        return placed

    def _note(self, name: str, result: GpuTensor) -> None:
        """Note an operation of torch's in the graph that is being captured, and the memory that it allocated."""
        storage = StorageWeakRef(result.untyped_storage())
        if threading.get_ident() not in self.capturing:
            self.order.allocate(self.current_stream(result.index).key, storage)
            return
        recorded = self.use(name, result.index, ())
        assert recorded is not None
        if storage not in recorded.outside:
            recorded.owned.add(storage)
        recorded.operations.append(name)


class _OnGpus(TorchFunctionMode):
    def __init__(self, cuda: FakeCuda):
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._cuda.call(function, args, kwargs or {})


class _Kernel:
    """A kernel as Triton launches it."""

    function = packed_metadata = None

    def __init__(self, cuda: FakeCuda, name: str):
        self._cuda = cuda
        self._name = name.removeprefix("afnext.kernels.")

    def launch_metadata(self, *_: Any) -> None:
        """For profilers; none."""

    def run(self, x: int, y: int, z: int, stream: int, *arguments: Any) -> None:
        """What Triton calls to launch. arguments: the kernel's, after five of Triton's own."""
        self._cuda.launched(self._name, (x, y, z), stream, arguments[5:])


class _Driver:
    """Triton's view of the GPUs: which are current in the thread that launches."""

    def __init__(self, cuda: FakeCuda):
        self.get_current_device = cuda.current_device
        self._cuda = cuda

    def get_current_stream(self, device: int) -> int:
        """The handle of this thread's stream of a GPU."""
        return self._cuda.current_stream(device).cuda_stream

    def get_current_target(self) -> GPUTarget:
        """What kernels are specialized for."""
        return GPUTarget("cuda", 90, 32)


def _is_view(name: str, result: Any, inputs: list[GpuTensor]) -> bool:
    """Whether an operation on tensors of a GPU only returned parts of them, so that the GPU has nothing to do."""
    if name.endswith("_") and name != "__getitem__":
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    parts = result if isinstance(result, tuple | list) else [result]
    return all(isinstance(part, Tensor) and part.untyped_storage()._cdata in storages for part in parts)


def _shape_of_product(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> tuple[int, ...]:
    """Of a linear layer, or of a one-dimensional convolution."""
    if weight.ndim == 2:
        return (*x.shape[:-1], len(weight))
    return (len(x), len(weight), (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1)


def _is_queued(tensor: Tensor, options: dict[str, Any]) -> bool:
    """Whether copying a tensor between host and GPU is queued, so that the host goes on at once."""
    return bool(options.get("non_blocking")) and (isinstance(tensor, GpuTensor) or getattr(tensor, "pinned", False))


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _on_the_host(value: Any) -> Any:
    """An argument with GPUs as devices replaced by the CPU, where tensors really are."""
    if isinstance(value, dict):
        return {name: CPU if name == "device" and _is_gpu(one) else one for name, one in value.items()}
    return tuple(CPU if _is_gpu(one) else one for one in value)


def _is_gpu(value: Any) -> bool:
    if isinstance(value, str):
        return value.split(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"
