"""Interleaved timing of several subjects by one clock; outputs are compared before a speedup is reported.

Subjects take turns, and every second round runs backwards (A B, B A, A B, ...), so that drift during the run
(temperature, clock rates, load of other processes) affects all of them alike. With a cold cache the clock writes
through a buffer larger than the last-level cache before each call; on a GPU that write also hides the launch of the
call.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.errors import AfnextError
from .machine import last_level_cache
from .steadiness import Placement, Threads, figures

Call = Callable[[], Any]

_LEAST_ROUNDS = 2  # one sample has no spread
_OUTLIER = 10  # how many times the tolerance a single element may be off by


class TimingError(AfnextError):
    """The requested measurement is not possible."""


class Clock(Protocol):
    """Times calls on one device."""

    name: str

    def prepare(self, call: Call) -> Call:
        """The function to time instead, made once before the first measurement: the call itself or its graph."""

    def seconds(self, call: Call) -> float:
        """Call once; return how long it took."""

    def evict(self) -> None:
        """Evict the device's caches."""


class WallClock:
    """The host's monotonic clock, for work that is complete when the call returns."""

    name = "wall clock"

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._evictor = CacheEvictor(torch.device("cpu"))

    def prepare(self, call: Call) -> Call:
        """The call as it is."""
        return call

    def seconds(self, call: Call) -> float:
        """Call once; return how long it took."""
        start = self._now()
        call()
        return self._now() - start

    def evict(self) -> None:
        """Write through a buffer larger than the last-level cache."""
        self._evictor()


class CudaClock:
    """The GPU's own clock: events recorded in its queue before and after the call, so host time does not count."""

    name = "cuda events"

    def __init__(self, device: torch.device, event: Callable[[], Any] | None = None):
        """event: makes an event with `record()`, `synchronize()` and `elapsed_time(end)` in ms, as torch.cuda.Event."""
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._evictor = CacheEvictor(device)

    def prepare(self, call: Call) -> Call:
        """The call as it is."""
        return call

    def seconds(self, call: Call) -> float:
        """Call once and wait for it; return how long the device took."""
        start, end = self._event(), self._event()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def evict(self) -> None:
        """Write through a buffer larger than the L2 cache."""
        self._evictor()


class GraphClock(CudaClock):
    """Like CudaClock, with each call captured once into a CUDA graph and replayed, so that launch overhead is
    excluded."""

    name = "cuda graph"

    def __init__(
        self,
        device: torch.device,
        event: Callable[[], Any] | None = None,
        capture: Callable[[Call], Call] | None = None,
    ):
        """capture: converts a call to a replay, by default with torch.cuda.CUDAGraph."""
        super().__init__(device, event)
        self._capture = capture or _captured

    def prepare(self, call: Call) -> Call:
        """The replay of the captured call. Raises TimingError for calls that wait for the device, which cannot be
        captured."""
        try:
            return self._capture(call)
        except RuntimeError as error:
            raise TimingError(f"this call cannot become a CUDA graph ({error}); time it without graphs") from error


def _captured(call: Call) -> Call:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # lazy initialization must happen before the capture
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class CacheEvictor:
    """Evicts a device's caches by adding one to each element of a buffer a quarter larger than the last level.

    Adding reads and writes; merely filling may bypass the caches. The buffer is made at the first call.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._buffer: Tensor | None = None

    def __call__(self) -> None:
        """Evict the caches."""
        if self._buffer is None:
            size = last_level_cache(self._device) * 5 // 4
            self._buffer = torch.zeros(size // 4, dtype=torch.int32, device=self._device)
        self._buffer.add_(1)


def clock_for(device: torch.device, *, graphs: bool = False) -> Clock:
    """The right clock for work on `device`; `graphs`: use CUDA graphs, which only GPUs have.

    Raises TimingError if graphs are requested on other devices.
    """
    if device.type == "cuda":
        return GraphClock(device) if graphs else CudaClock(device)
    if graphs:
        raise TimingError(f"CUDA graphs need a CUDA device, not {device.type}; leave them off")
    return WallClock()


@dataclass(frozen=True)
class Samples:
    """Times of one subject, in seconds, in order of measurement; at least one, none negative.

    placements: of the threads in each call, if watched.
    """

    seconds: tuple[float, ...]
    placements: tuple[Placement, ...] = ()

    def __post_init__(self) -> None:
        if not self.seconds or not all(0 <= value < math.inf for value in self.seconds):
            raise TimingError(f"samples are one or more finite times, got {self.seconds[:5]}")

    def quantile(self, q: float) -> float:
        """The quantile q of the samples, interpolated linearly."""
        ordered = sorted(self.seconds)
        below, fraction = divmod(q * (len(ordered) - 1), 1)
        low = ordered[int(below)]
        high = ordered[min(int(below) + 1, len(ordered) - 1)]
        return min(low + (high - low) * fraction, high)

    @property
    def median(self) -> float:
        """The median time."""
        return self.quantile(0.5)

    @property
    def p20(self) -> float:
        """The 20th percentile."""
        return self.quantile(0.2)

    @property
    def p80(self) -> float:
        """The 80th percentile."""
        return self.quantile(0.8)

    @property
    def p90(self) -> float:
        """The 90th percentile."""
        return self.quantile(0.9)

    @property
    def p99(self) -> float:
        """The 99th percentile."""
        return self.quantile(0.99)

    @property
    def min(self) -> float:
        """The shortest time."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """(p80 - p20) / median; 0 for a median of 0."""
        return (self.p80 - self.p20) / self.median if self.median else 0.0

    def values(self) -> dict[str, float | int | str]:
        """The figures of a record: median_s, p20_s, p80_s, p90_s, p99_s, min_s, spread, samples; if watched, those of
        `steadiness.figures`."""
        names = ("median", "p20", "p80", "p90", "p99", "min")
        return {
            **{f"{name}_s": getattr(self, name) for name in names},
            "spread": self.spread,
            "samples": len(self.seconds),
            **(figures(self.placements) if self.placements else {}),
        }


def measure_interleaved(
    subjects: Mapping[str, Call],
    *,
    repeats: int = 7,
    warmup: int = 1,
    min_time: float = 0.0,
    max_time: float = math.inf,
    clock: Clock | None = None,
    cold_cache: bool = False,
    watch: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Samples]:
    """Time the subjects in turn, in alternating order; return the samples of each.

    repeats: rounds; warmup: untimed calls of each before the first; min_time: least seconds of measurement; max_time:
    start no round after that many seconds, except the first two (both include evictions); clock: the wall clock
    by default; watch: note how the threads were placed, for calls of milliseconds or more; progress: called with
    (rounds done, rounds planned). Raises TimingError without subjects or repeats.
    """
    if not subjects or repeats < 1 or warmup < 0:
        raise TimingError(f"measuring takes a subject and a repeat, got {len(subjects)} subjects, {repeats} repeats")
    clock = clock or WallClock()
    calls = {name: clock.prepare(call) for name, call in subjects.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    placements: dict[str, list[Placement]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
    with _collector_paused():
        start, rounds = time.monotonic(), 0
        while _another_round(rounds, time.monotonic() - start, repeats, min_time, max_time):
            for name in list(calls)[:: -1 if rounds % 2 else 1]:
                if cold_cache:
                    clock.evict()
                threads = Threads() if watch else None
                times[name].append(clock.seconds(calls[name]))
                if threads is not None:
                    placements[name].append(threads.placement())
            rounds += 1
            if progress:
                progress(rounds, max(rounds, repeats))
    return {name: Samples(tuple(taken), tuple(placements[name])) for name, taken in times.items()}


def _another_round(rounds: int, elapsed: float, repeats: int, min_time: float, max_time: float) -> bool:
    if rounds < min(repeats, _LEAST_ROUNDS):
        return True
    return elapsed < max_time and (rounds < repeats or elapsed < min_time)


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Compute with `count` CPU threads inside the block (None: unchanged); yields the number in use."""
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise TimingError(f"the number of threads is {count}; it must be at least 1")
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection inside the block, because it would hit subjects at random."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Agreement:
    """Whether two outputs agree; error: the largest relative RMS error; reason: of a disagreement."""

    agrees: bool
    error: float
    reason: str = ""


def compare_outputs(expected: Any, actual: Any, tolerance: float) -> Agreement:
    """Whether `actual` equals `expected`: float tensors within `tolerance`, everything else exactly.

    Tensors must have equal shape and dtype; the error is RMS(actual - expected) / RMS(expected). In addition, the error
    of an element may be at most ten times the tolerance of the sum of its magnitude and the RMS. NaN never agrees;
    infinities must be equal. Lists, tuples and dicts are compared item by item.
    """
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        return _compare_tensors(expected, actual, tolerance)
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        if expected.keys() != actual.keys():
            return Agreement(False, math.inf, f"keys {list(expected)} and {list(actual)}")
        return _compare_items(list(expected.values()), [actual[key] for key in expected], tolerance)
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        return _compare_items(expected, actual, tolerance)
    if type(expected) is type(actual) and expected == actual:
        return Agreement(True, 0.0)
    return Agreement(False, math.inf, f"{_short(expected)} and {_short(actual)} differ")


def _compare_items(expected: Sequence[Any], actual: Sequence[Any], tolerance: float) -> Agreement:
    if len(expected) != len(actual):
        return Agreement(False, math.inf, f"{len(expected)} and {len(actual)} items")
    error = 0.0
    for index, pair in enumerate(zip(expected, actual, strict=True)):
        found = compare_outputs(*pair, tolerance)
        if not found.agrees:
            return Agreement(False, found.error, f"item {index}: {found.reason}")
        error = max(error, found.error)
    return Agreement(True, error)


def _compare_tensors(expected: Tensor, actual: Tensor, tolerance: float) -> Agreement:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        kinds = [f"{x.dtype} {tuple(x.shape)}" for x in (expected, actual)]
        return Agreement(False, math.inf, f"{kinds[0]} and {kinds[1]}")
    equal = expected == actual
    if not expected.is_floating_point():
        wrong = int((~equal).sum())
        return Agreement(not wrong, wrong / max(1, expected.numel()), f"{wrong} elements differ" if wrong else "")
    # The difference of equal elements is 0, also of infinities.
    difference = torch.where(equal, 0.0, actual.double() - expected.double()).abs()
    if not difference.isfinite().all():
        return Agreement(False, math.inf, "NaN or infinity on one side only")
    size = torch.where(expected.isfinite(), expected.double(), 0.0)
    rms = _rms(size)
    error = _rms(difference) / rms if rms else float(bool(difference.any()))
    worst = float((difference - _OUTLIER * tolerance * (size.abs() + rms)).max()) if difference.numel() else 0.0
    if error > tolerance:
        return Agreement(False, error, f"relative RMS error {error:.2g} above {tolerance:.2g}")
    if worst > 0:
        return Agreement(False, error, f"an element is off by {float(difference.max()):.2g} at an RMS of {rms:.2g}")
    return Agreement(True, error)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Speedup:
    """The speedup, or None with a reason. low, high: from opposite 20th and 80th percentiles."""

    ratio: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""


def speedup(baseline: Samples, subject: Samples, agreement: Agreement) -> Speedup:
    """The baseline's median time over the subject's; refused, ratio None with a reason, when their outputs differ."""
    if not agreement.agrees:
        return Speedup(None, reason=f"the outputs differ: {agreement.reason}")
    if not subject.p20:
        return Speedup(None, reason="the clock is too coarse for this call")
    return Speedup(baseline.median / subject.median, baseline.p20 / subject.p80, baseline.p80 / subject.p20)
