"""What is said of a machine is true of this one; a GPU's share is tested on a pretended driver."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from afnext.bench.core import machine as module
from afnext.bench.core.machine import (
    energy_joules,
    gpu,
    isa,
    last_level_cache,
    machine,
    peak_device_memory,
    peak_rss,
    reset_peaks,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux tells of itself")


def test_describes_this_machine() -> None:
    described = machine(CPU)
    assert json.loads(json.dumps(described)) == described
    assert described["threads"] == torch.get_num_threads()
    assert 1 <= described["cores"] <= (os.cpu_count() or 1)
    assert described["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["versions"]["torch"] == torch.__version__
    assert described["versions"]["afnext"]
    assert described["gpu"] is None
    age = datetime.now(timezone.utc) - datetime.fromisoformat(described["timestamp"])
    assert 0 <= age.total_seconds() < 60


@linux
def test_memory_and_processor_are_those_the_kernel_reports() -> None:
    described = machine(CPU)
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert described["memory_bytes"] == pytest.approx(int(total.split()[1]) * 1024, rel=0.01)
    assert described["cpu"]
    words = set(Path("/proc/cpuinfo").read_text().split())
    assert set(isa()) <= words
    assert ("avx2" in isa()) == ("avx2" in words)


def test_the_commit_is_the_one_of_this_checkout() -> None:
    repository = Path(__file__).parents[3]
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert module.checkout()[0] == head.stdout.strip()


def test_dirty_means_that_a_tracked_file_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(module, "_REPOSITORY", tmp_path)
    assert module.checkout() == (None, None)
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    commit, dirty = module.checkout()
    assert commit is not None
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "untracked").write_text("results")
    assert module.checkout() == (commit, False)
    (tmp_path / "file").write_text("two")
    assert module.checkout() == (commit, True)


def test_code_inside_a_foreign_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", tmp_path], check=True, capture_output=True)
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(module, "_REPOSITORY", tmp_path / "site-packages")
    assert module.checkout() == (None, None)


@linux
def test_peak_memory_keeps_what_was_freed_until_it_is_reset() -> None:
    size = 200 << 20
    if not reset_peaks(CPU):
        pytest.skip("this kernel does not let a process reset its peak")
    before = peak_rss()
    assert before is not None
    block = bytearray(os.urandom(1 << 20)) * (size >> 20)
    assert len(block) == size
    del block
    peak = peak_rss()
    assert peak is not None
    assert peak - before > 0.8 * size
    assert reset_peaks(CPU)
    after = peak_rss()
    assert after is not None
    assert peak - after > 0.8 * size


def test_the_cpu_has_neither_device_memory_nor_an_energy_counter() -> None:
    assert peak_device_memory(CPU) is None
    assert energy_joules(CPU) is None
    assert gpu(CPU) is None


def test_the_last_level_cache_has_a_plausible_size() -> None:
    assert 256 << 10 <= last_level_cache(CPU) <= 4 << 30


class PretendedNvml:
    """A driver whose first device, as NVML counts, is not torch's first, and which cannot tell its power limit."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self) -> None:
        self.millijoules = 5_000_000

    def nvmlInit(self) -> None: ...  # noqa: N802 - NVML's own names, here and below

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-0123-abcd":
            raise KeyError(uuid)
        return uuid

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return 1980

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:  # noqa: N802
        raise RuntimeError("not supported")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedNvml]:
    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=150 << 30, major=9, minor=0, uuid="0123-abcd", L2_cache_size=60 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    driver: Any = PretendedNvml()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    module._nvml.cache_clear()
    yield driver
    module._nvml.cache_clear()


def test_a_gpu_is_described_with_driver_and_clocks(nvml: PretendedNvml) -> None:
    described = gpu(CUDA)
    assert described is not None
    assert (described["name"], described["driver"], described["capability"]) == ("NVIDIA H200", "580.1", "9.0")
    assert (described["sm_mhz"], described["memory_mhz"], described["max_sm_mhz"]) == (1755, 2619, 1980)
    assert described["power_limit_mw"] is None
    assert last_level_cache(CUDA) == 60 << 20


def test_energy_is_read_in_joules(nvml: PretendedNvml) -> None:
    before = energy_joules(CUDA)
    nvml.millijoules += 2500
    after = energy_joules(CUDA)
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(2.5)


def test_without_nvml_a_gpu_is_still_described(nvml: PretendedNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    described = gpu(CUDA)
    assert described is not None
    assert described["name"] == "NVIDIA H200"
    assert "driver" not in described
    assert energy_joules(CUDA) is None
