"""Fewer threads for decode steps while other processes use the cores.

The threads of a step wait for each other. A thread whose core another process uses delays all of them, until the system
gives the core back. Beside one busy process on two cores, two threads take two to four times as long as alone, and one
thread 1.7 times. So:

    lost = time that the threads, all together, were ready to run without a CPU / elapsed time
    if lost > 0.3: try threads - ceil(lost), keep the faster number for a while, and try again
"""

import ctypes
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .native import AVAILABLE, portable
from .native.threads import limited_threads

_log = logging.getLogger("afnext.kernels")

VARIABLE = "OMP_DYNAMIC"
"""OpenMP's environment variable for whether the number of threads may change; "false" keeps it."""

_LOST = 0.3
_TRIAL, _STEPS = 0.05, 2  # seconds and steps of a trial, at least
_FIRST, _MOST = 2, 8  # times from trials to trials, in multiples of what they take: doubled each time
_PAUSE = 0.2  # seconds without a step after which it starts again


def reason_against(threads: int) -> str | None:
    """Why steps always use all `threads`, or None if they may use fewer."""
    if threads == 1:
        return "there is one thread"
    if os.environ.get(VARIABLE, "").strip().lower() == "false":
        return f"{VARIABLE}=false is set"
    if not AVAILABLE:
        return "the native kernels are not built"
    if sys.platform != "linux" or time_without_cpu(1) is None:
        return "the system does not tell how long threads waited for a CPU"
    return None


def time_without_cpu(threads: int) -> float | None:
    """Seconds that the caller's OpenMP threads, all together, were ready to run but had no CPU, since they started.

    None if the system does not tell. Takes about 10 us.
    """
    nanoseconds = _function()(threads)
    return None if nanoseconds < 0 else nanoseconds / 1e9


@cache
def _function() -> Any:
    function = portable().afnext_time_without_cpu
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64]
    return function


@dataclass
class _Period:
    """Consecutive steps with the same number of threads. waited: `time_without_cpu` at its start."""

    threads: int
    seconds: float
    start: float
    waited: float
    steps: int = 0
    in_steps: float = 0.0


class Contention:
    """Chooses the number of threads of each of similar steps: `with contention.step(): ...`."""

    def __init__(
        self,
        waited: Callable[[int], float | None] = time_without_cpu,
        now: Callable[[], float] = time.perf_counter,
    ):
        """waited: as `time_without_cpu`; now: seconds."""
        self._waited, self._now = waited, now
        self._most = 0
        self._period: _Period | None = None
        self._end = 0.0  # of the last step
        self._apart = _FIRST
        self._all = 0.0  # seconds of a step with all threads, when they last lost time

    @contextmanager
    def step(self) -> Iterator[None]:
        """Compute a step, with torch's number of threads or fewer (`native.threads.thread_count`)."""
        most, start = torch.get_num_threads(), self._now()
        if most != self._most:
            self._most, self._period = most, None
            self._active = reason_against(most) is None
        if not self._active:
            yield
            return
        if self._period is None or start - self._end > _PAUSE:
            self._begin(most, _TRIAL, self._time_without_cpu())
        period = self._period
        assert period is not None
        with limited_threads(period.threads):
            yield
        self._end = self._now()
        period.steps += 1
        period.in_steps += self._end - start
        if self._end - period.start >= period.seconds and period.steps >= _STEPS:
            self._decide(period)

    def _time_without_cpu(self) -> float:
        return self._waited(self._most) or 0.0

    def _begin(self, threads: int, seconds: float, waited: float) -> None:
        self._period = _Period(threads, seconds, self._now(), waited)

    def _decide(self, period: _Period) -> None:
        """Begin the period after `period`, which has ended."""
        each, waited = period.in_steps / period.steps, self._time_without_cpu()
        if period.threads == self._most:
            lost = (waited - period.waited) / (self._end - period.start)
            if lost <= _LOST:
                self._apart = _FIRST
                return self._begin(self._most, _TRIAL, waited)
            self._all = each
            return self._begin(max(1, self._most - math.ceil(lost)), _TRIAL, waited)
        if period.seconds > _TRIAL:
            return self._begin(self._most, _TRIAL, waited)
        threads = period.threads if each < self._all else self._most
        if self._apart == _FIRST and threads < self._most:
            _log.info("decoding with %d of %d threads, as other processes use the cores", threads, self._most)
        trials = max(_TRIAL, _STEPS * self._all) + self._end - period.start
        self._begin(threads, self._apart * trials, waited)
        self._apart = min(2 * self._apart, _MOST)
