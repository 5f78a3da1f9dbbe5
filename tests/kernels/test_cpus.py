"""The default number of threads, from pretended machines: affinity, physical cores and quotas of control groups."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from afnext.kernels import cpus
from afnext.kernels.cpus import COUNT_VARIABLES, Cpus, usable_cpus, use_default_threads, use_threads

V1, V2, CPU = "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup", "sys/fs/cgroup/cpu"


def machine(root: Path, siblings: dict[int, str], groups: str = "", files: dict[str, str] | None = None) -> Path:
    """A file system with the given list of sibling CPUs for each CPU, control groups, and further files."""
    described = {f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list": text for cpu, text in siblings.items()}
    for name, text in {**described, "proc/self/cgroup": groups, **(files or {})}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


FOUR_CORES = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}


def test_siblings_count_once(tmp_path: Path) -> None:
    found = usable_cpus(machine(tmp_path, FOUR_CORES), range(8))
    assert found.cores == ({0, 4}, {1, 5}, {2, 6}, {3, 7})
    assert (found.threads, found.allowed, found.description) == (4, set(range(8)), "4 cores with 8 CPUs")


def test_only_allowed_cpus_count(tmp_path: Path) -> None:
    found = usable_cpus(machine(tmp_path, FOUR_CORES), {1, 2, 5})
    assert (found.cores, found.threads) == (({1, 5}, {2}), 2)


def test_without_a_topology_each_cpu_is_a_core(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path, {3, 9}) == Cpus((frozenset({3}), frozenset({9})))


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {f"{V2}/cpu.max": "150000 100000"}, 1.5),
        ("0::/", {f"{V2}/cpu.max": "max 100000"}, None),
        ("0::/a/b", {f"{V2}/a/b/cpu.max": "max 100000", f"{V2}/a/cpu.max": "200000 100000"}, 2.0),
        ("0::/a/b", {f"{V2}/a/b/cpu.max": "300000 100000", f"{V2}/a/cpu.max": "200000 100000"}, 2.0),
        ("0::/../elsewhere", {f"{V2}/cpu.max": "50000 100000"}, 0.5),
        ("5:cpuset:/\n4:cpu,cpuacct:/docker/1",
         {f"{V1}/cpu.cfs_quota_us": "250000", f"{V1}/cpu.cfs_period_us": "100000"}, 2.5),
        ("4:cpu:/a", {f"{CPU}/a/cpu.cfs_quota_us": "-1", f"{CPU}/a/cpu.cfs_period_us": "100000"}, None),
        ("1:cpu:/\n0::/x", {f"{V2}/unified/x/cpu.max": "100000 100000"}, 1.0),
        ("", {}, None),
    ],
    ids=["v2", "v2-max", "v2-parent", "v2-smallest", "v2-container", "v1", "v1-none", "hybrid", "no-groups"],
)  # fmt: skip
def test_quotas_of_control_groups(groups: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert usable_cpus(machine(tmp_path, FOUR_CORES, groups, files), range(8)).quota == quota


@pytest.mark.parametrize(("quota", "threads"), [(None, 4), (9.0, 4), (2.5, 2), (1.0, 1), (0.25, 1)])
def test_a_quota_limits_the_threads(quota: float | None, threads: int) -> None:
    assert Cpus(tuple(frozenset({cpu}) for cpu in range(4)), quota).threads == threads


def test_this_machine_has_cpus() -> None:
    found = usable_cpus()
    assert 1 <= found.threads <= len(found.allowed) <= (os.cpu_count() or 1)


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch, restored_threads: None) -> Iterator[None]:
    """Nobody chose a number of threads."""
    for name in COUNT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpus, "_chosen", False)
    return


TWO_OF_FOUR = Cpus(tuple(frozenset({cpu, cpu + 4}) for cpu in range(4)), quota=2.5)


@pytest.mark.parametrize("present", [8, 4])
def test_torchs_own_default_is_lowered(present: int, unasked: None) -> None:
    torch.set_num_threads(present)
    assert use_default_threads(TWO_OF_FOUR) == "4 cores with 8 CPUs, quota of 2.5 CPUs"
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("present", [1, 3, 7])
def test_another_number_was_chosen(present: int, unasked: None) -> None:
    torch.set_num_threads(present)
    assert use_default_threads(TWO_OF_FOUR) == "chosen by --threads or torch.set_num_threads"
    assert torch.get_num_threads() == present


@pytest.mark.parametrize("variable", COUNT_VARIABLES)
def test_variables_choose_the_number(variable: str, unasked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "8")
    torch.set_num_threads(8)
    assert (use_default_threads(TWO_OF_FOUR), torch.get_num_threads()) == (f"{variable} is set", 8)


def test_the_command_line_chooses_the_number(unasked: None) -> None:
    use_threads(8)
    assert "chosen" in use_default_threads(TWO_OF_FOUR)
    assert torch.get_num_threads() == 8
