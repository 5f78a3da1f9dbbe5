"""Whether the threads of a timed call each had a core of their own.

Two threads that wait for each other on one core, while another core is idle or has a third process, make a call several
times as long, in steps of the system's tick. A benchmark cannot prevent that for every subject, but it can say so.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TASKS = Path("/proc/self/task")
_BUSY = 0.2  # share of a call's time from which a thread is one of those that compute
_SOME = 0.2  # share of a subject's calls from which it is warned of


@dataclass(frozen=True)
class Placement:
    """cpus: CPU time of a call over its time, all threads together; crowded: whether busy threads shared a CPU."""

    cpus: float
    crowded: bool


class Threads:
    """The threads of this process, from the start of a call on."""

    def __init__(self) -> None:
        self._ran = _run_times()
        self._start = time.perf_counter_ns()
        self._cpu = time.process_time_ns()

    def placement(self) -> Placement:
        """Of the call that ended just now. Outside Linux only the CPU time is known."""
        wall, cpu = time.perf_counter_ns() - self._start, time.process_time_ns() - self._cpu
        busy = [name for name, ran in _run_times().items() if ran - self._ran.get(name, 0) > _BUSY * wall]
        cpus = [found for name in busy if (found := _last_cpu(name)) is not None]
        return Placement(cpu / max(1, wall), len(set(cpus)) < len(cpus))


def figures(placements: Sequence[Placement]) -> dict[str, float | int | str]:
    """The figures of a record, of at least one call: cpus (the median), crowded (number of calls), and a warning if
    threads shared a core in many of them."""
    crowded, count = sum(one.crowded for one in placements), len(placements)
    found: dict[str, float | int | str] = {"cpus": sorted(one.cpus for one in placements)[count // 2]}
    if crowded >= max(1, _SOME * count):
        found |= {"crowded": crowded, "warning": f"threads shared a core at the end of {crowded} of {count} calls"}
    return found


def _run_times() -> dict[str, int]:
    """Nanoseconds that each thread of this process has run; empty if unknown."""
    if sys.platform != "linux":
        return {}
    times = {}
    for name in os.listdir(_TASKS):
        fields = _fields(name, "schedstat")
        if fields:
            times[name] = int(fields[0])
    return times


def _last_cpu(name: str) -> int | None:
    """The CPU that a thread runs on or ran on last."""
    fields = _fields(name, "stat")
    return int(fields[36]) if fields else None


def _fields(name: str, file: str) -> list[str]:
    """The fields of a file about a thread, after its name; none if the thread has ended."""
    try:
        return (_TASKS / name / file).read_text().rpartition(")")[2].split()
    except OSError:
        return []
