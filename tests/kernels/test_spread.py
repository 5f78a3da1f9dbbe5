"""OpenMP threads that are moved to a core each, without lasting effect, and only if nobody asked otherwise."""

import json
import os
import subprocess
import sys

import pytest

from afnext.kernels import native
from afnext.kernels.cpus import Cpus
from afnext.kernels.spread import PLACEMENT_VARIABLES, reason_against

# Prints the CPUs that each thread may use at first, after being moved without being released again (an empty set is
# refused), after `spread`, and after `spread` with a variable that forbids it. In a process of its own, where OpenMP
# has no other threads.
CODE = """
import json, os, torch
from afnext.kernels.activation import gelu
from afnext.kernels import spread
cpus = sorted(os.sched_getaffinity(0))
torch.set_num_threads(len(cpus))
x = torch.randn(1 << 18)
expected, found = gelu(x), []
def note():
    assert torch.equal(gelu(x), expected)
    found.append(sorted(sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")))
note()
sets, allowed, size = spread._sets(len(cpus), frozenset(cpus))
assert spread._function()(sets, bytes(size), size, len(cpus)) == len(cpus)
note()
everywhere = allowed * len(cpus)
assert spread._function()(everywhere, allowed, size, len(cpus)) == 0
spread.spread(len(cpus))
note()
print(json.dumps(found))
"""

linux_with_kernels = pytest.mark.skipif(
    sys.platform != "linux" or not native.AVAILABLE, reason="threads are moved on Linux, by the native kernels"
)


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PLACEMENT_VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@linux_with_kernels
def test_each_thread_is_moved_to_a_core_and_may_leave_it() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("with one CPU there is nothing to spread")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, moved, released = json.loads(done.stdout)
    assert all(allowed == cpus for allowed in [*first, *released])
    assert sorted(cpu for allowed in moved if len(allowed) < len(cpus) for cpu in allowed) == cpus


FOUR_CORES = Cpus(tuple(frozenset({cpu, cpu + 4}) for cpu in range(4)))


@linux_with_kernels
def test_as_many_threads_as_cores_or_cpus_are_spread() -> None:
    assert [reason_against(threads, FOUR_CORES) for threads in (4, 8)] == [None, None]
    assert reason_against(3, FOUR_CORES) == "not as many threads as cores (4) or CPUs (8)"
    assert reason_against(1, FOUR_CORES) == "there is one thread"


@linux_with_kernels
@pytest.mark.parametrize("variable", PLACEMENT_VARIABLES)
def test_who_places_threads_otherwise_is_obeyed(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "false")
    assert reason_against(4, FOUR_CORES) == f"{variable} is set"


def test_elsewhere_threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert reason_against(4, FOUR_CORES) == "only possible on Linux"
