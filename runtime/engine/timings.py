"""Where the time of a request went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch

from ...kernels.dispatch import synchronize


@dataclass
class Timings:
    """Seconds spent in each stage of one request, and when its tokens came.

    first_token and total count from the start of the request, waiting for the other requests of a batch included;
    generate counts from the first token to the last.
    """

    load_audio: float = 0.0
    log_mel: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    generate: float = 0.0
    total: float = 0.0
    tokens_per_second: float = 0.0
    _start: float = field(default_factory=time.perf_counter, repr=False)

    @contextmanager
    def measure(self, stage: str, device: torch.device) -> Iterator[None]:
        """Add the time spent inside the block to `stage`, work queued on `device` included."""
        synchronize(device)
        start = time.perf_counter()
        yield
        synchronize(device)
        setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)

    @property
    def elapsed(self) -> float:
        """Seconds since the request was made."""
        return time.perf_counter() - self._start

    def to_dict(self) -> dict[str, float]:
        """The stages and their seconds, and tokens_per_second."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}

    def token(self, count: int) -> None:
        """Note that the `count`-th token has come."""
        self.total = self.elapsed
        if count == 1:
            self.first_token = self.total
        self.generate = self.total - self.first_token
        self.tokens_per_second = (count - 1) / self.generate if count > 1 else 0.0
