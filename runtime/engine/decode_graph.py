"""One decode step with everything at fixed addresses, so that a CUDA graph can record it once and repeat it.

At one token a sequence, a step is some three hundred small kernels, and launching them one by one from Python takes
longer than they run. A graph launches them all at once. It repeats exactly the memory accesses that it recorded, so the
step takes its inputs from tensors that stay: the host writes tokens, positions and pages into them, and slots and key
lengths are computed from those on the device. So one recording serves whatever sequences come and go, as long as their
number and the width of their page table stay. Nothing in a step waits for the device; the one wait is the caller's, who
reads back the tokens chosen from the scores.
"""

import logging

import torch
from torch import Tensor

from ...kernels.dispatch import forced_backend
from ...kernels.triton_language import AVAILABLE as TRITON_AVAILABLE
from ..model.audio_flamingo import AudioFlamingo
from .kv_cache import KVCache, page_table
from .repeated_calls import RepeatedCalls, repeatable

_log = logging.getLogger("afnext.engine")


class DecodeStep:
    """Decodes `time` tokens of each of `rows` sequences at a time: the newest one, and drafts of those after it.

    A step stays with the backend under which it was made, forced or not: it is to be called under that one alone.
    """

    def __init__(self, model: AudioFlamingo, cache: KVCache, *, rows: int, width: int, time: int = 1, cuda_graph: bool):
        """width: pages that the longest sequence may have. cuda_graph: record the step and repeat it, where the device
        and the kernels allow it; on a CPU its layers' native calls (see `repeated_calls`)."""
        self._model = model
        self._cache = cache
        self._table = torch.zeros(rows, width, dtype=torch.int32, device=model.device)
        self._inputs = torch.zeros(2, rows, time, dtype=torch.int64, device=model.device)
        self._pages: list[list[int]] = []
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capturable = cuda_graph and capturable(model.device)
        repeats = cuda_graph and repeatable(model.device, rows * time)
        self._layers = RepeatedCalls(model.decoder) if repeats else model.decoder

    def __call__(self, tokens: list[list[int]], positions: list[int], pages: list[list[int]]) -> Tensor:
        """Decode the newest tokens of each sequence, writing their keys and values INTO the cache.

        tokens: [rows][time]; positions: the index of the first of these in its sequence; pages: of each sequence.
        Returns the scores of what follows each token, [rows, time, vocab] float32, valid until the next call.
        """
        indices = [list(range(start, start + self._inputs.shape[2])) for start in positions]
        self._inputs.copy_(torch.tensor([tokens, indices]), non_blocking=True)
        if pages != self._pages:
            table = page_table(pages, torch.device("cpu"))
            self._table[:, : table.shape[1]].copy_(table, non_blocking=True)
            self._pages = [list(row) for row in pages]
        if self._capturable and self._logits is not None and self._graph is None:
            self._capture()
        if self._graph is None:
            self._logits = self._step()
        else:
            self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _step(self) -> Tensor:
        decoder = self._model.decoder
        tokens, positions = self._inputs
        hidden = self._layers(decoder.embed(tokens), positions, self._cache.view(self._table, positions))
        return decoder.logits(hidden)

    def _capture(self) -> None:
        """Record the step, which does not run it. The first one ran without, and compiled and loaded every kernel."""
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = self._step()
        _log.info("decoding %d sequences a step in a CUDA graph", len(self._table))


def capturable(device: torch.device) -> bool:
    """Whether a decode step on `device` can be recorded: the kernels of the torch backend wait for key lengths."""
    return device.type == "cuda" and TRITON_AVAILABLE and forced_backend() in (None, "triton")
