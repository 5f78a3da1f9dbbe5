"""The measuring core: true times, fair turns, sound statistics, and no speedup where outputs differ."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afnext.bench.core.timing import (
    Agreement,
    CacheEvictor,
    CudaClock,
    GraphClock,
    Samples,
    TimingError,
    WallClock,
    clock_for,
    compare_outputs,
    measure_interleaved,
    speedup,
    threads,
)

CPU = torch.device("cpu")
TIMES = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=40)


class CountingClock(WallClock):
    """A clock by which every call takes as long as it says itself, and which writes down what happens."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def seconds(self, call: Callable[[], Any]) -> float:
        name, seconds = call()
        self.log.append(name)
        return float(seconds)

    def evict(self) -> None:
        self.log.append("evict")


def steady(name: str, seconds: float) -> Callable[[], tuple[str, float]]:
    return lambda: (name, seconds)


# ---- clocks


@pytest.mark.parametrize("duration", [0.005, 0.05])
def test_the_wall_clock_knows_how_long_a_sleep_is(duration: float) -> None:
    samples = measure_interleaved({"sleep": lambda: time.sleep(duration)}, repeats=5, warmup=0)["sleep"]
    assert samples.min >= duration * 0.99
    assert samples.min <= duration * 1.5 + 0.01


def test_a_slower_subject_shows_as_slower() -> None:
    numbers = torch.ones(1000)

    def planted() -> None:
        time.sleep(0.004)
        numbers.sum()

    samples = measure_interleaved({"quick": numbers.sum, "slow": planted}, repeats=7)
    assert samples["slow"].min > 10 * samples["quick"].min


class PretendedGpu:
    """A device with a queue: launches return at once, the device works later, and only events know when."""

    def __init__(self) -> None:
        self.host = 0.0  # ms
        self.device = 0.0

    def launch(self, milliseconds: float, host: float = 0.01) -> None:
        self.host += host
        self.device = max(self.device, self.host) + milliseconds

    def event(self) -> "PretendedEvent":
        return PretendedEvent(self)


class PretendedEvent:
    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu = gpu
        self.time = math.nan
        self.done = False

    def record(self) -> None:
        self.time = max(self.gpu.device, self.gpu.host)

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.time)
        self.done = True

    def elapsed_time(self, end: "PretendedEvent") -> float:
        assert end.done, "the end of the call was not waited for"
        return end.time - self.time


def test_the_gpu_clock_tells_the_time_of_the_device() -> None:
    gpu = PretendedGpu()
    clock = CudaClock(torch.device("cuda"), gpu.event)
    samples = measure_interleaved(
        {"short": lambda: gpu.launch(2.0), "long": lambda: gpu.launch(6.0)}, repeats=3, clock=clock
    )
    assert samples["short"].median == pytest.approx(0.002, rel=0.02)
    assert samples["long"].median == pytest.approx(0.006, rel=0.02)
    assert clock.name == "cuda events"


def test_work_queued_before_does_not_count() -> None:
    gpu = PretendedGpu()
    gpu.launch(100.0)
    assert CudaClock(torch.device("cuda"), gpu.event).seconds(lambda: gpu.launch(1.0)) == pytest.approx(0.001)


def test_a_graph_is_captured_once_and_its_replays_are_timed() -> None:
    gpu = PretendedGpu()
    captured = []

    def capture(call: Callable[[], Any]) -> Callable[[], Any]:
        captured.append(call)
        return lambda: gpu.launch(1.0)

    clock = GraphClock(torch.device("cuda"), gpu.event, capture)

    def eager() -> None:
        gpu.launch(1.0, host=50.0)

    samples = measure_interleaved({"kernel": eager}, repeats=4, clock=clock)["kernel"]
    assert captured == [eager]
    assert samples.median == pytest.approx(0.001, rel=0.02)


def test_a_call_that_no_graph_can_hold_is_refused_with_a_reason() -> None:
    def capture(call: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing")

    clock = GraphClock(torch.device("cuda"), PretendedGpu().event, capture)
    with pytest.raises(TimingError, match=r"stream is capturing.*without graphs"):
        measure_interleaved({"kernel": lambda: None}, clock=clock)


def test_the_clock_follows_the_device() -> None:
    assert isinstance(clock_for(CPU), WallClock)
    assert type(clock_for(torch.device("cuda"))) is CudaClock
    assert isinstance(clock_for(torch.device("cuda"), graphs=True), GraphClock)
    with pytest.raises(TimingError, match="CUDA graphs need"):
        clock_for(CPU, graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_a_real_gpu_takes_longer_for_more_work(graphs: bool) -> None:
    device = torch.device("cuda")
    small, large = (torch.randn(n, n, device=device) for n in (1024, 4096))
    clock = clock_for(device, graphs=graphs)
    subjects = {"small": lambda: small @ small, "large": lambda: large @ large}
    samples = measure_interleaved(subjects, repeats=10, warmup=3, clock=clock, cold_cache=True)
    assert samples["large"].median > 8 * samples["small"].median


# ---- turns


@given(st.integers(1, 9), st.integers(2, 4))
def test_subjects_take_turns_in_alternating_order(repeats: int, count: int) -> None:
    clock = CountingClock()
    names = [f"subject {i}" for i in range(count)]
    samples = measure_interleaved({n: steady(n, 1.0) for n in names}, repeats=repeats, clock=clock)
    rounds = [clock.log[i : i + count] for i in range(0, len(clock.log), count)]
    assert rounds == [names if i % 2 == 0 else names[::-1] for i in range(repeats)]
    assert all(len(taken.seconds) == repeats for taken in samples.values())


def test_a_steady_drift_of_the_machine_favours_nobody() -> None:
    class SlowingDown(CountingClock):
        def seconds(self, call: Callable[[], Any]) -> float:
            return super().seconds(call) + 0.1 * len(self.log)

    subjects = {"a": steady("a", 1.0), "b": steady("b", 1.0)}
    samples = measure_interleaved(subjects, repeats=8, clock=SlowingDown())
    assert sum(samples["a"].seconds) == pytest.approx(sum(samples["b"].seconds))


def test_a_cold_cache_is_made_before_every_call() -> None:
    clock = CountingClock()
    measure_interleaved({"a": steady("a", 1.0), "b": steady("b", 1.0)}, repeats=2, clock=clock, cold_cache=True)
    assert clock.log == ["evict", "a", "evict", "b", "evict", "b", "evict", "a"]


def test_the_evictor_writes_more_than_the_last_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afnext.bench.core.timing.last_level_cache", lambda device: 1 << 20)
    evictor = CacheEvictor(CPU)
    evictor()
    evictor()
    buffer = evictor._buffer
    assert buffer is not None
    assert buffer.nbytes > 1 << 20
    assert bool((buffer == 2).all())


def test_warming_up_is_not_measured() -> None:
    calls: list[int] = []

    def first_is_slow() -> tuple[str, float]:
        calls.append(len(calls))
        return "a", 9.0 if len(calls) <= 2 else 1.0

    samples = measure_interleaved({"a": first_is_slow}, repeats=3, warmup=2, clock=CountingClock())["a"]
    assert samples.seconds == (1.0, 1.0, 1.0)


def test_goes_on_for_the_least_time_and_stops_at_the_most() -> None:
    long = measure_interleaved({"nap": lambda: time.sleep(0.002)}, repeats=1, min_time=0.05)["nap"]
    assert 5 <= len(long.seconds) <= 26
    short = measure_interleaved({"nap": lambda: time.sleep(0.02)}, repeats=100, max_time=0.05)["nap"]
    assert 2 <= len(short.seconds) <= 4
    always = measure_interleaved({"nap": lambda: time.sleep(0.02)}, repeats=100, max_time=0)["nap"]
    assert len(always.seconds) == 2


def test_progress_ends_with_everything_done() -> None:
    seen: list[tuple[int, int]] = []
    measure_interleaved(
        {"a": steady("a", 1.0)}, repeats=3, clock=CountingClock(), progress=lambda d, t: seen.append((d, t))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(TimingError, match="0 subjects"):
        measure_interleaved({})
    with pytest.raises(TimingError, match="0 repeats"):
        measure_interleaved({"a": lambda: None}, repeats=0)


def test_the_thread_count_holds_inside_the_block_alone() -> None:
    before = torch.get_num_threads()
    other = before + 1
    with threads(other) as count:
        assert count == torch.get_num_threads() == other
    assert torch.get_num_threads() == before
    with threads(None) as count:
        assert count == before
    with pytest.raises(TimingError, match="at least 1"), threads(0):
        pass


# ---- statistics


@given(TIMES, st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.9, 0.99, 1.0]))
def test_quantiles_are_numpys(seconds: list[float], q: float) -> None:
    assert Samples(tuple(seconds)).quantile(q) == pytest.approx(np.quantile(seconds, q), rel=1e-9, abs=1e-9)


@given(TIMES)
def test_quantiles_rise_and_stay_within_the_samples(seconds: list[float]) -> None:
    s = Samples(tuple(seconds))
    ordered = [s.min, s.p20, s.median, s.p80, s.p90, s.p99, max(seconds)]
    assert ordered == sorted(ordered)
    assert s.spread >= 0


@given(TIMES, st.randoms())
def test_the_order_of_samples_does_not_matter(seconds: list[float], random: Any) -> None:
    shuffled = random.sample(seconds, len(seconds))
    assert Samples(tuple(seconds)).values() == Samples(tuple(shuffled)).values()


def test_the_spread_is_relative() -> None:
    narrow, wide = Samples((1.0, 1.0, 1.0, 1.0, 9.0)), Samples((1.0, 2.0, 3.0, 4.0, 5.0))
    assert narrow.spread == pytest.approx((0.2 * 8 + 0) / 1, abs=2)  # the outlier moves the median not at all
    assert narrow.median == 1.0
    assert narrow.spread == pytest.approx(1.6)  # p80 lies a fifth of the way from 1 to 9
    assert wide.spread == pytest.approx((4.2 - 1.8) / 3)
    assert Samples((2.0, 4.0, 6.0, 8.0, 10.0)).spread == pytest.approx(wide.spread)


def test_a_record_says_how_many_samples_there_were() -> None:
    values = Samples((1.0, 2.0, 3.0)).values()
    assert values["median_s"] == 2.0
    assert values["min_s"] == 1.0
    assert values["samples"] == 3
    assert {"p20_s", "p80_s", "p90_s", "p99_s", "spread"} <= values.keys()


@pytest.mark.parametrize("bad", [(), (1.0, -1.0), (math.nan,), (math.inf,)])
def test_no_statistics_of_impossible_times(bad: tuple[float, ...]) -> None:
    with pytest.raises(TimingError):
        Samples(bad)


# ---- agreement and speedup


def test_equal_and_nearly_equal_outputs_agree(seed: int) -> None:
    x = torch.randn(64, 33)
    assert compare_outputs(x, x.clone(), 0.0).agrees
    near = compare_outputs(x, x * (1 + 1e-3), 2e-3)
    assert near.agrees
    assert near.error == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    "plant",
    [
        lambda x: x * 1.05,
        lambda x: x + 0.05,
        lambda x: x.flip(0),
        lambda x: x.to(torch.float64),
        lambda x: x[:-1],
        lambda x: x.T,
        lambda x: torch.where(torch.arange(x.numel()).view(x.shape) == 77, torch.nan, x),
        lambda x: torch.where(torch.arange(x.numel()).view(x.shape) == 77, x + 1, x),
        lambda x: torch.zeros_like(x),
        lambda x: list(x),
        lambda x: None,
    ],
    ids=[
        *("scaled", "shifted", "permuted", "widened", "shortened", "transposed"),
        *("nan", "one element", "zero", "list", "none"),
    ],
)
def test_a_wrong_output_disagrees_and_forbids_the_speedup(seed: int, plant: Callable[[Any], Any]) -> None:
    x = torch.randn(256, 64)
    agreement = compare_outputs(x, plant(x), tolerance=1e-2)
    assert not agreement.agrees
    refused = speedup(Samples((2.0, 2.0)), Samples((1.0, 1.0)), agreement)
    assert refused.ratio is None
    assert refused.low is None
    assert refused.high is None
    assert agreement.reason
    assert agreement.reason in refused.reason


def test_tokens_must_be_equal_to_the_last() -> None:
    assert compare_outputs([1, 2, 3], [1, 2, 3], 0.5).agrees
    for wrong in ([1, 2, 4], [1, 2], [1, 2, 3, 4], [1, 2, 3.0]):
        assert not compare_outputs([1, 2, 3], wrong, 0.5).agrees
    ids = torch.tensor([5, 6, 7])
    assert compare_outputs(ids, ids.clone(), 0.5).agrees
    assert not compare_outputs(ids, torch.tensor([5, 6, 8]), 0.5).agrees


def test_the_faulty_item_of_several_is_named(seed: int) -> None:
    x = torch.randn(9)
    assert compare_outputs((x, x), (x, x), 1e-3).agrees
    found = compare_outputs({"a": x, "b": x}, {"b": x + 1, "a": x}, 1e-3)
    assert not found.agrees
    assert found.reason.startswith("item 1")
    assert not compare_outputs({"a": x}, {"b": x}, 1e-3).agrees


def test_infinities_agree_with_themselves_alone() -> None:
    masked = torch.tensor([1.0, -math.inf, 2.0])
    assert compare_outputs(masked, masked.clone(), 1e-3).agrees
    assert not compare_outputs(masked, torch.tensor([1.0, -1e30, 2.0]), 1e-3).agrees
    assert not compare_outputs(masked, torch.tensor([1.0, math.inf, 2.0]), 1e-3).agrees
    assert not compare_outputs(torch.tensor([math.nan]), torch.tensor([math.nan]), 1e-3).agrees


def test_zeros_agree_with_zeros_alone() -> None:
    zeros = torch.zeros(5)
    assert compare_outputs(zeros, zeros.clone(), 1e-3).agrees
    assert not compare_outputs(zeros, zeros + 1e-9, 1e-3).agrees


@given(TIMES.filter(lambda t: min(t) > 1e-6), TIMES.filter(lambda t: min(t) > 1e-6))
def test_a_speedup_lies_between_its_bounds(slow: list[float], fast: list[float]) -> None:
    found = speedup(Samples(tuple(slow)), Samples(tuple(fast)), Agreement(True, 0.0))
    assert found.ratio is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.ratio * (1 + 1e-12)
    assert found.ratio <= found.high * (1 + 1e-12)
    assert found.ratio == pytest.approx(np.median(slow) / np.median(fast))


def test_a_clock_that_saw_nothing_gives_no_speedup() -> None:
    refused = speedup(Samples((1.0,)), Samples((0.0,)), Agreement(True, 0.0))
    assert refused.ratio is None
    assert "coarse" in refused.reason
