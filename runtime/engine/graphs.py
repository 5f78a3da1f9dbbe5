"""Work on a GPU that is recorded once as a CUDA graph and then replayed.

A decode step of one token per sequence, or a batch of audio windows, launches hundreds of kernels, and launching them
from Python can take longer than they run. A graph launches all of them at once. It repeats the memory accesses that it
recorded, so the work reads its inputs from tensors that stay in place.

Graphs that never run at the same time share one memory pool for intermediate results, and copy what they compute to one
tensor outside of it. They are captured on a stream that each `GraphMemory` has for this purpose: torch's own capture
stream is on the GPU of the first capture, and two engines may capture at the same time.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.compilation import is_collecting
from ...kernels.device_state import current, runs_triton
from ...kernels.dispatch import forced_backend
from ...kernels.triton_language import AVAILABLE as TRITON_AVAILABLE

_RETRY_CALLS = 256  # after a failed capture
_log = logging.getLogger("afnext.engine")


class GraphMemory:
    """Shared by graphs that run one at a time: a memory pool, the capture stream, and the tensor that receives what
    they compute."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._results = torch.empty(0)

    @property
    def pool(self) -> Any:
        """The pool's handle for captures."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream for captures, on the GPU of the engine."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def renew(self) -> None:
        """Use another pool and stream for later captures, because a failed capture may leave these unusable."""
        self._pool = self._stream = None

    def results_like(self, tensor: Tensor) -> Tensor:
        """The tensor for results of this shape and dtype. A larger one replaces it; earlier graphs keep theirs."""
        if self._results.numel() < tensor.numel() or self._results.device != tensor.device:
            self._results = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        return self._results[: tensor.numel()].view(tensor.shape)


class RepeatedWork:
    """A function of tensors at fixed addresses that computes one tensor. Each call must be given the same function.

    It runs as it is the first time, which compiles and loads every kernel. Then it is recorded, and the recording is
    replayed. If capture fails, for instance because memory is short, it runs without a graph, and capture is tried
    again later; the first failure is logged as a warning.
    """

    def __init__(self, what: str, device: torch.device, memory: GraphMemory | None):
        """what: for the log, such as "decoding 4 sequences". memory: None never records."""
        self._what = what
        self._device = device
        self._memory = memory
        self._result: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = self._capture_at = 0

    @property
    def recorded(self) -> bool:
        """Whether a recording is replayed."""
        return self._graph is not None

    def __call__(self, run: Callable[[], Tensor]) -> Tensor:
        """What `run` computes, valid until the next call of work that shares the memory."""
        if is_collecting():
            return run()  # its kernels have not run, and will not before the next call
        if self._result is not None and self._calls >= self._capture_at:
            self.capture(run)
        self._calls += 1
        if self._graph is None:
            self._result = run()
        else:
            self._graph.replay()
        assert self._result is not None
        return self._result

    def capture(self, run: Callable[[], Tensor]) -> None:
        """Record the work without running it, unless it is recorded. It must have run once."""
        if self._memory is None or self._graph is not None:
            return
        assert self._result is not None
        result = self._memory.results_like(self._result)
        try:
            self._graph = captured(lambda: result.copy_(run()), self._device, self._memory)
        except RuntimeError as error:
            self._memory.renew()
            level = logging.INFO if self._capture_at else logging.WARNING
            self._capture_at = self._calls + _RETRY_CALLS
            _log.log(level, "%s without a CUDA graph, as capture failed: %s", self._what, error)
        else:
            self._result = result
            _log.info("%s in a CUDA graph", self._what)


def captured(run: Callable[[], object], device: torch.device, memory: GraphMemory) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the work that `run` launches on `device`. Raises RuntimeError if capture fails."""
    graph = torch.cuda.CUDAGraph()
    with current(device):
        before = torch.cuda.current_stream()
        try:
            # Other threads may use the GPU during capture.
            mode, stream = "thread_local", memory.stream(device)
            with torch.cuda.graph(graph, pool=memory.pool, stream=stream, capture_error_mode=mode):
                run()
        except RuntimeError:
            torch.cuda.set_stream(before)  # `torch.cuda.graph` leaves its stream current if ending the capture fails
            raise
    return graph


def capturable(device: torch.device) -> bool:
    """Whether work on `device` can be recorded. Not with the torch backend, which waits for key lengths."""
    return runs_triton(device) and TRITON_AVAILABLE and forced_backend() in (None, "triton")
