"""One decode step with all tensors at fixed addresses, so that a CUDA graph can capture it once and replay it.

A step of one token per sequence launches about three hundred small kernels, and launching them from Python takes longer
than they run. So the step reads its inputs from tensors that stay in place: the host writes tokens, positions and pages
into them, and the device computes slots and key lengths from those. One graph serves any sequences that fit: missing
rows, tokens and pages are padding, whose keys and values go to the cache's padding page. `graphs` has the rest.
A step does not wait for the device. The caller does when it reads the chosen tokens. On a CPU, steps use fewer threads
while other processes use the cores (`kernels.contention`).
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from ...kernels.contention import Contention
from ..model.audio_flamingo import AudioFlamingo
from .graphs import GraphMemory, RepeatedWork, capturable
from .kv_cache import KVCache, page_table
from .repeated_calls import RepeatedCalls, repeatable


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
        columns = width + (cache.padding_page is not None)  # tokens after the last page of a sequence are padding
        self._table = torch.zeros(rows, columns, dtype=torch.int32, device=model.device)
        self._inputs = torch.zeros(2, rows, time, dtype=torch.int64, device=model.device)
        self._pages: list[list[int]] | None = None
        graph_memory = (memory or GraphMemory()) if cuda_graph and capturable(model.device) else None
        self._work = RepeatedWork(f"decoding {rows} sequences a step", model.device, graph_memory)
        repeats = cuda_graph and repeatable(model.device, rows * time)
        self._layers = RepeatedCalls(model.decoder) if repeats else model.decoder
        self._on_free_cores = Contention().step if model.device.type == "cpu" else nullcontext

    @property
    def recorded(self) -> bool:
        """Whether a CUDA graph is replayed."""
        return self._work.recorded

    def __call__(self, tokens: list[list[int]], positions: list[int], pages: list[list[int]]) -> Tensor:
        """Decode the newest tokens of each sequence, writing their keys and values INTO the cache.

        tokens: [sequences][tokens], equally many per sequence; positions: the index of the first of them in its
        sequence; pages: of each sequence. Returns the scores after each token, [sequences, tokens, vocab] float32,
        valid until the next call of this step or of one that shares its memory.
        """
        self._set_inputs(tokens, positions, pages)
        with self._on_free_cores():
            scores = self._work(self._step)
        return scores[: len(tokens), : len(tokens[0]) if tokens else 0]

    def warm_up(self) -> None:
        """Run the step on padding, and record it if possible."""
        self([], [], [])
        self._work.capture(self._step)

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
