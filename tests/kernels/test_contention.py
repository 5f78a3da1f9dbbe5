"""The number of threads of steps on pretended machines, of which other processes use cores."""

import random
import sys
from collections.abc import Callable

import pytest
import torch

from afnext.kernels import native
from afnext.kernels.contention import VARIABLE, Contention, reason_against, time_without_cpu
from afnext.kernels.native.threads import limited_threads, thread_count

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not native.AVAILABLE, reason="contention is measured on Linux, by the native kernels"
)


class Machine:
    """Time that passes in steps only. `seconds`: of a step with a number of threads; `busy`: cores that other processes
    use, of which each takes half of a thread's time if all cores have a thread."""

    def __init__(self, cores: int, seconds: Callable[[int, int], float]):
        self.cores, self.busy, self.time, self.waited = cores, 0, 0.0, 0.0
        self._seconds = seconds

    def run(self, contention: Contention, duration: float) -> list[int]:
        """Make steps for `duration` seconds. Returns the number of threads of each."""
        used, end = [], self.time + duration
        while self.time < end:
            with contention.step():
                used.append(thread_count())
                crowded = max(0, used[-1] + self.busy - self.cores)
                taken = self._seconds(used[-1], crowded)
                self.time += taken
                self.waited += crowded * taken / 2
        return used

    def contention(self) -> Contention:
        return Contention(lambda threads: self.waited, lambda: self.time)


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch, restored_threads: None) -> int:
    """As many cores as torch uses threads."""
    monkeypatch.delenv(VARIABLE, raising=False)
    count = random.randint(2, 16)
    print(f"{count} cores")
    torch.set_num_threads(count)
    return count


def delayed(threads: int, crowded: int) -> float:
    """A step takes 10 ms in all; one thread without a core of its own makes it three times as long."""
    return 0.01 / threads * (3 if crowded else 1)


def test_alone_all_threads_are_used(seed: int, cores: int) -> None:
    machine = Machine(cores, delayed)
    assert set(machine.run(machine.contention(), 5)) == {cores}


def test_a_busy_core_is_left_while_it_is_busy(seed: int, cores: int) -> None:
    machine = Machine(cores, delayed)
    contention = machine.contention()
    machine.run(contention, 1)
    machine.busy = 1
    used = machine.run(contention, 10)
    fewer = used.count(cores - 1)
    assert set(used) == {cores - 1, cores}
    assert fewer * delayed(cores - 1, 0) > 8.5
    machine.busy = 0
    machine.run(contention, 5)
    assert set(machine.run(contention, 5)) == {cores}


def test_all_threads_stay_if_fewer_are_not_faster(seed: int, cores: int) -> None:
    """As if the other process used the memory and not the core."""
    machine = Machine(cores, lambda threads, crowded: 0.01 / threads)
    machine.busy = 1
    used = machine.run(machine.contention(), 20)
    assert used.count(cores) > 0.9 * len(used)


def test_after_a_pause_all_threads_are_tried(seed: int, cores: int) -> None:
    machine = Machine(cores, delayed)
    contention, machine.busy = machine.contention(), 1
    while machine.run(contention, 0.01)[-1] == cores:
        pass
    machine.time += 1
    assert machine.run(contention, 0.001)[0] == cores


def test_one_thread_and_a_refusal_are_kept(seed: int, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    assert reason_against(1) == "there is one thread"
    monkeypatch.setenv(VARIABLE, "FALSE")
    assert reason_against(2) == "OMP_DYNAMIC=false is set"
    machine = Machine(cores, delayed)
    machine.busy = 1
    assert set(machine.run(machine.contention(), 5)) == {cores}


def test_an_error_in_a_step_ends_its_limit(seed: int, cores: int) -> None:
    machine = Machine(cores, delayed)
    contention, machine.busy = machine.contention(), 1
    while machine.run(contention, 0.01)[-1] == cores:
        pass

    def fail() -> None:
        with contention.step():
            assert thread_count() < cores
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert thread_count() == cores


def test_threads_report_how_long_they_waited() -> None:
    first, second = time_without_cpu(2), time_without_cpu(2)
    if first is None:
        pytest.skip("this system does not tell how long threads waited for a CPU")
    assert second is not None
    assert 0 <= first <= second


def test_a_limit_is_never_more_than_torchs_number(cores: int) -> None:
    with limited_threads(cores + 1):
        assert thread_count() == cores
    with limited_threads(1):
        assert thread_count() == 1
        with limited_threads(None):
            assert thread_count() == cores
    assert thread_count() == cores
