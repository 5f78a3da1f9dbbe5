"""The time of each stage of a request."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch

_AHEAD = 2
"""Stages that may be queued on a stream of a GPU while the host continues: enough to keep the GPU busy, few enough that
reported progress is nearly accurate."""


@dataclass
class Timings:
    """Seconds spent in each stage of one request, and the times of its tokens.

    queue is the wait for pages and a place in the batch. If audio is encoded while the rest of it is loaded, load_audio
    and the stages after it overlap. first_token and total count from the start of the request,
    including the wait for other requests of a batch; generate counts from the first token to the last. If the encoder
    has a stream of its own, encode and prefill overlap.
    """

    load_audio: float = 0.0
    queue: float = 0.0
    log_mel: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    generate: float = 0.0
    total: float = 0.0
    tokens_per_second: float = 0.0
    _start: float = field(default_factory=time.perf_counter, repr=False)
    _submitted: float | None = field(default=None, repr=False)
    _queued: dict[int, deque[tuple[str, Any, Any]]] = field(default_factory=dict, repr=False)

    @contextmanager
    def measure(self, stage: str, device: torch.device) -> Iterator[None]:
        """Add the time spent inside the block to `stage`; on a GPU, the time of the work queued inside it.

        A GPU's time is known when the work is done, at the latest after `settle`. Waits for earlier stages if many are
        queued on the same stream.
        """
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)
            return
        stream = torch.cuda.current_stream(device)
        queued = self._queued.setdefault(stream.cuda_stream, deque())
        while len(queued) >= _AHEAD:
            self._settle_first(queued)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        yield
        end.record(stream)
        queued.append((stage, begin, end))

    def settle(self) -> None:
        """Wait for the stages that are queued on a GPU, and add their time."""
        for queued in self._queued.values():
            while queued:
                self._settle_first(queued)

    def _settle_first(self, queued: deque[tuple[str, Any, Any]]) -> None:
        stage, begin, end = queued.popleft()
        end.synchronize()
        setattr(self, stage, getattr(self, stage) + begin.elapsed_time(end) / 1000)

    @property
    def elapsed(self) -> float:
        """Seconds since the request was made."""
        return time.perf_counter() - self._start

    def to_dict(self) -> dict[str, float]:
        """The stages and their seconds, and tokens_per_second."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}

    def submitted(self) -> None:
        """Record that the request waits to be admitted."""
        self._submitted = time.perf_counter()

    def admitted(self) -> None:
        """Record that the request has its pages. Later calls, after preemption, change nothing."""
        if self._submitted is not None:
            self.queue += time.perf_counter() - self._submitted
            self._submitted = None

    def token(self, count: int) -> None:
        """Record the arrival of the `count`-th token; all work queued before it is done."""
        self.settle()
        self.total = self.elapsed
        if count == 1:
            self.first_token = self.total
        self.generate = self.total - self.first_token
        self.tokens_per_second = (count - 1) / self.generate if count > 1 else 0.0
