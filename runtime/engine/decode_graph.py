"""One decode step with all tensors at fixed addresses, so that a CUDA graph can capture it once and replay it.

A step of one token per sequence launches about three hundred small kernels, and launching them from Python takes longer
than they run. A graph launches all of them at once. It repeats the memory accesses that it captured, so the step reads
its inputs from tensors that stay in place: the host writes tokens, positions and pages into them, and the device
computes slots and key lengths from those. One graph serves any sequences that fit: missing rows, tokens and pages are
padding, whose keys and values go to the cache's padding page.

Graphs run one at a time. So they share one memory pool for intermediate results, and they copy their scores to one
tensor outside of it. They are captured on a stream that each engine has for this purpose: torch's own capture stream is
on the GPU of the first capture, and two engines may capture at the same time.
A step does not wait for the device. The caller does when it reads the chosen tokens.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.device_state import current, runs_triton
from ...kernels.dispatch import forced_backend
from ...kernels.triton_language import AVAILABLE as TRITON_AVAILABLE
from ..model.audio_flamingo import AudioFlamingo
from .kv_cache import KVCache, page_table
from .repeated_calls import RepeatedCalls, repeatable

_RETRY_CALLS = 256  # after a failed capture
_log = logging.getLogger("afnext.engine")


class GraphMemory:
    """Shared by the graphs of one engine: a memory pool, the capture stream, and the tensor that receives their
    scores."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._scores = torch.empty(0)

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

    def scores_like(self, logits: Tensor) -> Tensor:
        """The tensor for scores of this shape and dtype. A larger one replaces it; earlier graphs keep theirs."""
        if self._scores.numel() < logits.numel() or self._scores.device != logits.device:
            self._scores = torch.empty(logits.numel(), dtype=logits.dtype, device=logits.device)
        return self._scores[: logits.numel()].view(logits.shape)


class DecodeStep:
    """Decodes up to `time` tokens of each of up to `rows` sequences: the newest one and speculative tokens after it.

    If the cache has no padding page, it must be called with exactly that many. It must be called under the same forced
    backend, or none, as it was made.
    """

    def __init__(
        self,
        model: AudioFlamingo,
        cache: KVCache,
        *,
        rows: int,
        width: int,
        time: int = 1,
        cuda_graph: bool,
        memory: GraphMemory | None = None,
    ):
        """width: maximal pages per sequence. cuda_graph: record the step and repeat it if device and kernels allow it;
        on a CPU, record the native calls of its layers (see `repeated_calls`). memory: shared with other steps; only
        one may run at a time, and its scores are valid until the next one runs."""
        self._model = model
        self._cache = cache
        self._memory = memory or GraphMemory()
        columns = width + (cache.padding_page is not None)  # tokens after the last page of a sequence are padding
        self._table = torch.zeros(rows, columns, dtype=torch.int32, device=model.device)
        self._inputs = torch.zeros(2, rows, time, dtype=torch.int64, device=model.device)
        self._pages: list[list[int]] | None = None
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = self._capture_at = 0
        self._capturable = cuda_graph and capturable(model.device)
        repeats = cuda_graph and repeatable(model.device, rows * time)
        self._layers = RepeatedCalls(model.decoder) if repeats else model.decoder

    def __call__(self, tokens: list[list[int]], positions: list[int], pages: list[list[int]]) -> Tensor:
        """Decode the newest tokens of each sequence, writing their keys and values INTO the cache.

        tokens: [sequences][tokens], equally many per sequence; positions: the index of the first of them in its
        sequence; pages: of each sequence. Returns the scores after each token, [sequences, tokens, vocab] float32,
        valid until the next call of this step or of one that shares its memory.
        """
        self._set_inputs(tokens, positions, pages)
        if self._capturable and self._graph is None and self._logits is not None and self._calls >= self._capture_at:
            self._capture()
        self._calls += 1
        if self._graph is None:
            self._logits = self._step()
        else:
            self._graph.replay()
        assert self._logits is not None
        return self._logits[: len(tokens), : len(tokens[0]) if tokens else 0]

    def warm_up(self) -> None:
        """Run the step on padding, and record it if possible."""
        self([], [], [])
        if self._capturable and self._graph is None:
            self._capture()

    def _set_inputs(self, tokens: list[list[int]], positions: list[int], pages: list[list[int]]) -> None:
        _, rows, time = self._inputs.shape
        missing = rows - len(tokens)
        newest = [row + [0] * (time - len(row)) for row in tokens] + [[0] * time] * missing
        indices = [list(range(start, start + time)) for start in positions + [0] * missing]
        self._inputs.copy_(torch.tensor([newest, indices]), non_blocking=True)
        if pages != self._pages:
            padding = self._cache.padding_page or 0
            rows_of_pages = pages + [[]] * missing
            table = page_table(rows_of_pages, torch.device("cpu"), width=self._table.shape[1], padding=padding)
            self._table.copy_(table, non_blocking=True)
            self._pages = [list(row) for row in pages]

    def _step(self) -> Tensor:
        decoder = self._model.decoder
        tokens, positions = self._inputs
        hidden = self._layers(decoder.embed(tokens), positions, self._cache.view(self._table, positions))
        return decoder.logits(hidden)

    def _capture(self) -> None:
        """Record the step without running it. The first call ran unrecorded, which compiled and loaded every kernel.

        If capture fails, for instance because memory is short, steps run without a graph, and capture is tried again
        later.
        """
        assert self._logits is not None
        scores = self._memory.scores_like(self._logits)
        try:
            self._graph = captured(lambda: scores.copy_(self._step()), self._model.device, self._memory)
        except RuntimeError as error:
            self._memory.renew()
            self._capture_at = self._calls + _RETRY_CALLS
            _log.warning("decoding %d sequences without a CUDA graph, as capture failed: %s", len(self._table), error)
        else:
            self._logits = scores
            _log.info("decoding %d sequences a step in a CUDA graph", len(self._table))


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
    """Whether a decode step on `device` can be recorded. Not with the torch backend, which waits for key lengths."""
    return runs_triton(device) and TRITON_AVAILABLE and forced_backend() in (None, "triton")
