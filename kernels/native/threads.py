"""The number of threads that native kernels use."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_limit: ContextVar[int | None] = ContextVar("afnext_threads", default=None)


def thread_count() -> int:
    """The number of threads that a native kernel uses now: torch's, or fewer within `limited_threads`."""
    limit, threads = _limit.get(), torch.get_num_threads()
    return threads if limit is None else min(limit, threads)


@contextmanager
def limited_threads(most: int | None) -> Iterator[None]:
    """Let native kernels use at most `most` threads within the block, or torch's number if None."""
    token = _limit.set(most)
    try:
        yield
    finally:
        _limit.reset(token)
