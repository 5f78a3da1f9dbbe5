"""The decode steps of a model, one for each size that occurs, made on first use or ahead of time.

Steps that become CUDA graphs are made for a few sizes, and smaller batches are padded: a power of two of sequences, a
power of two of tokens of each (or as many as there can be), and 4, 16, 64, ... pages of the longest sequence. Otherwise
each change of the batch would need another recording. On a CPU padding costs time, so steps have the size of the batch.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

from ...kernels.dispatch import forced_backend
from ...kernels.row_groups import row_invariant
from ..model.audio_flamingo import AudioFlamingo
from .decode_graph import DecodeStep
from .graphs import GraphMemory, capturable
from .kv_cache import KVCache, pages_for
from .options import EngineOptions

MAX_SPECULATING = 8  # sequences decoded at once, beyond which no speculative tokens are used
# Maximal number of recorded steps, for different numbers of sequences and tokens, widths of the page table, and forced
# backends. On a GPU there are fewer sizes than that. On a CPU each step keeps its calls' results: together up to about
# 250 MB at full size, which the reserve of the memory plan covers.
_MAX_STEPS, _MAX_STEPS_ON_CPU = 256, 4
_FIRST_WIDTH = 4  # pages; each further width is four times as large: attention skips pages that a sequence lacks


class DecodeSteps:
    """Finds the step that serves a batch, and records it if there is none."""

    def __init__(self, model: AudioFlamingo, cache: KVCache, options: EngineOptions):
        self._model = model
        self._cache = cache
        self._options = options
        self._steps: dict[tuple[int, int, int, str | None], DecodeStep] = {}
        self._memory = GraphMemory()
        self.recordings = 0

    @property
    def recordable(self) -> bool:
        """Whether decode steps become CUDA graphs."""
        return self._options.cuda_graphs and capturable(self._model.device)

    def clear(self) -> None:
        """Drop the recorded steps, which refer to the cache's tensors by address."""
        self._steps.clear()
        self._memory = GraphMemory()

    def works(self) -> list[Callable[[], object]]:
        """Functions that record the steps of every size, the largest first, so that smaller ones reuse the memory of
        larger ones."""
        sizes = sorted(set(self._sizes()), key=lambda size: -size[0] * size[1])
        return [partial(self._warm_up, *size) for size in sizes]

    def _warm_up(self, rows: int, time: int, width: int) -> None:
        with row_invariant() if self._options.batch_invariant else nullcontext():
            self.step(rows, time, width).warm_up()

    def step(self, rows: int, time: int, pages: int) -> DecodeStep:
        """The step for `rows` sequences with `time` tokens each, the longest of `pages` pages."""
        rows, time, width = self._bucket(rows, time, pages)
        key = (rows, time, width, forced_backend())
        step = self._steps.pop(key, None)
        if step is None:
            most = _MAX_STEPS if self.recordable else _MAX_STEPS_ON_CPU
            if len(self._steps) == most:
                del self._steps[next(iter(self._steps))]
            step = DecodeStep(
                self._model,
                self._cache,
                rows=rows,
                width=width,
                time=time,
                cuda_graph=self._options.cuda_graphs,
                memory=self._memory,
            )
            self.recordings += 1
        self._steps[key] = step
        return step

    def _sizes(self) -> Iterator[tuple[int, int, int]]:
        """Number of rows, tokens per row and maximal pages of every step to be made."""
        most_tokens, options = 1 + self._options.draft_tokens, self._options
        limit = pages_for(self._model.config.decoder.max_positions, options.page_size)
        width = min(limit, max(1, self._cache.pool.pages))
        widths = {self._bucket(1, 1, pages)[2] for pages in range(1, width + 1)}
        speculating = min(options.max_batch, MAX_SPECULATING)
        if options.batch_invariant:
            shapes = {(rows, 1) for rows in range(1, max(options.max_batch, speculating * most_tokens) + 1)}
        else:
            shapes = {(rows, 1) for rows in range(1, options.max_batch + 1)}
            shapes |= {(rows, time) for rows in range(1, speculating + 1) for time in range(1, most_tokens + 1)}
        for rows, time in shapes:
            for pages in widths:
                yield self._bucket(rows, time, pages)

    def _bucket(self, rows: int, time: int, pages: int) -> tuple[int, int, int]:
        """Number of rows, tokens per row and width of the page table of the step that serves the given sizes."""
        if not self.recordable:
            return rows, time, _power_of_two(pages)
        width = _FIRST_WIDTH
        while width < pages:
            width *= 4
        return _power_of_two(rows), min(_power_of_two(time), 1 + self._options.draft_tokens), width


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
