"""Which calls count as crowded, from pretended files of the system about this process's threads."""

import sys
from pathlib import Path

import pytest

from afnext.bench.core import steadiness
from afnext.bench.core.steadiness import Placement, Threads, figures
from afnext.bench.core.timing import measure_interleaved

HOURS = 10**14  # nanoseconds: more than a fifth of any call's time
STAT = "7 (a name) with ) R" + " 0" * 35 + " {cpu} 0 0"


class System:
    """Threads by name."""

    def __init__(self, folder: Path):
        self.folder = folder

    def thread(self, name: str, cpu: int, ran: int) -> None:
        """A thread that has run `ran` ns so far and is on `cpu`."""
        (self.folder / name).mkdir(exist_ok=True)
        (self.folder / name / "schedstat").write_text(f"{ran} 5 6\n")
        (self.folder / name / "stat").write_text(STAT.format(cpu=cpu))


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(steadiness, "_TASKS", tmp_path)
    return System(tmp_path)


@pytest.mark.parametrize(
    ("after", "crowded"),
    [
        ({"1": (0, HOURS), "2": (1, HOURS)}, False),
        ({"1": (1, HOURS), "2": (1, HOURS)}, True),
        ({"1": (1, HOURS), "2": (1, 0)}, False),
        ({"1": (0, HOURS), "2": (1, HOURS), "3": (0, HOURS)}, True),
    ],
    ids=["apart", "together", "one-idle", "a-new-one"],
)
def test_busy_threads_on_one_cpu_are_crowded(after: dict[str, tuple[int, int]], crowded: bool, system: System) -> None:
    for name in ("1", "2"):
        system.thread(name, 0, 0)
    threads = Threads()
    for name, (cpu, ran) in after.items():
        system.thread(name, cpu, ran)
    assert threads.placement().crowded is crowded


def test_samples_warn_of_crowded_calls(system: System) -> None:
    ran = [0]

    def call(cpu: int) -> None:
        ran[0] += HOURS
        system.thread("1", 0, ran[0])
        system.thread("2", cpu, ran[0])

    call(1)
    samples = measure_interleaved({"apart": lambda: call(1), "together": lambda: call(0)}, repeats=3, watch=True)
    assert samples["together"].values()["warning"] == "threads shared a core at the end of 3 of 3 calls"
    assert samples["together"].values()["crowded"] == 3
    assert not {"warning", "crowded"} & samples["apart"].values().keys()
    unwatched = measure_interleaved({"together": lambda: call(0)}, repeats=3)
    assert not {"warning", "cpus"} & unwatched["together"].values().keys()


def test_a_few_crowded_calls_are_no_warning() -> None:
    few = [Placement(1.9, index == 0) for index in range(6)]
    assert figures(few) == {"cpus": 1.9}
    assert "1 of 5" in str(figures(few[:5])["warning"])


def test_threads_of_this_process_have_placements() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells where threads run")
    threads = Threads()
    sum(range(10_000))
    assert threads.placement().cpus >= 0
