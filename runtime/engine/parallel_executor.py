"""The executor of several processes, as rank 0 sees it: it sends each operation to the other ranks and runs its part.

All ranks fail together: if one raises an exception, ends or does not answer, the others are ended, and operations of
rank 0 raise EngineDeadError with the cause.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.compilation import Uncompiled
from ..errors import EngineDeadError
from ..model.group import Group
from .executor import Executor, LocalExecutor
from .prefill import PlacedWindow
from .rank import Lists, Op, Rank, encoded
from .timings import Timings


class Links(Protocol):
    """Rank 0's connections to the other ranks."""

    @property
    def failure(self) -> EngineDeadError | None:
        """Why the other ranks have ended, or None."""

    def send(self, message: bytes) -> None:
        """Send a message to every other rank. Raises OSError if one has ended."""

    def fail(self, error: BaseException) -> EngineDeadError:
        """End the other ranks after an error on rank 0, which another rank's end may have caused. Returns the cause."""

    def close(self) -> None:
        """End the other ranks. Idempotent."""


class ParallelExecutor(Executor):
    """Computes with all ranks. The model and the cache are the shards of rank 0."""

    def __init__(self, local: LocalExecutor, group: Group, links: Links):
        self.model = local.model
        self.cache = local.cache
        self.encoder_stream = local.encoder_stream
        self.size = group.size
        self._local = local
        self._rank = Rank(local, group)
        self._links = links
        self._threads = 0

    @property
    def recordings(self) -> int:
        """See `Executor`."""
        return self._local.recordings

    @property
    def recordable(self) -> bool:
        """See `Executor`."""
        return self._local.recordable

    @property
    def failure(self) -> EngineDeadError | None:
        """See `Executor`."""
        return self._links.failure

    def set_threads(self, count: int) -> None:
        """See `Executor`. The ranks share the threads."""
        each = max(1, count // self.size)
        if each != self._threads or torch.get_num_threads() != each:
            self._run(Op.SET_THREADS, [each])
            self._threads = each

    def resize(self, pages: int) -> None:
        """See `Executor`."""
        pool = self.cache.pool
        error: Exception | None = self._run(Op.RESIZE, [pages, pool.pages, min(pool.end, pages)])
        if error is not None:
            raise error

    def copy_page(self, source: int, target: int) -> None:
        """See `Executor`."""
        self._run(Op.COPY_PAGE, [source, target])

    def encode(self, windows: list[PlacedWindow], timings: Timings) -> list[Tensor]:
        """See `Executor`. Each rank encodes some of the windows."""
        lengths = [window.waveform.numel() for window in windows]
        return self._run(Op.ENCODE, lengths, [window.index for window in windows], given=(windows, timings))

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `Executor`."""
        return self._run(Op.EMBED, token_ids.tolist())

    def prefill(self, x: Tensor, pages: list[int], start: int) -> Tensor:
        """See `Executor`."""
        return self._run(Op.PREFILL, [start, x.shape[1]], pages, given=x)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Executor`."""
        return self._run(Op.LOGITS, list(hidden.shape), given=hidden)

    def decode(self, tokens: list[list[int]], positions: list[int], pages: list[list[int]]) -> Tensor:
        """See `Executor`."""
        return self._run(Op.DECODE, [token for row in tokens for token in row], positions, *pages)

    def compile(self, kernels: Sequence[Uncompiled], progress: Callable[[int, int], None]) -> None:
        """See `Executor`."""
        self._run(Op.COMPILE, given=(kernels, progress))

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """See `Executor`."""
        self._run(Op.WARM_UP, given=progress)

    def read(self, index: int, pages: list[int]) -> Tensor:
        """See `Executor`."""
        return self._run(Op.READ, [index], pages)

    def write(self, index: int, pages: list[int], rows: Tensor) -> None:
        """See `Executor`."""
        self._run(Op.WRITE, [index, len(rows)], pages, given=rows)

    def fingerprint(self) -> str:
        """See `Executor`."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self._run(Op.FINGERPRINT)

    def close(self) -> None:
        """See `Executor`."""
        self._links.close()

    def _run(self, op: Op, *lists: list[int], given: Any = None) -> Any:
        if (failure := self._links.failure) is not None:
            raise failure
        numbers: Lists = list(lists)
        try:
            self._links.send(encoded(op, numbers))
            return self._rank.run(op, numbers, given)
        except BaseException as error:
            raise self._links.fail(error) from error
