"""The CPUs that this process may use, and the number of threads to compute with on them.

    threads = min(physical cores among the allowed CPUs, CPU quota of the control group)

Two threads on one physical core share its arithmetic units and gain nothing. Threads beyond the quota are stopped for
the rest of each period, and the others wait for them. torch's own default ignores the quota, and in some builds the
cores.
"""

import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_log = logging.getLogger("afnext.kernels")

COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that set torch's number of threads."""

_chosen = False  # whether `use_threads` was called


@dataclass(frozen=True)
class Cpus:
    """cores: the allowed CPUs of each physical core, in order; quota: CPU seconds per second that the control groups
    grant, None without a limit."""

    cores: tuple[frozenset[int], ...]
    quota: float | None = None

    @property
    def allowed(self) -> frozenset[int]:
        """All allowed CPUs."""
        return frozenset().union(*self.cores)

    @property
    def threads(self) -> int:
        """The number of threads to compute with: at least 1; a quota is rounded down."""
        return min(len(self.cores), max(1, math.floor(self.quota))) if self.quota else len(self.cores)

    @property
    def description(self) -> str:
        """What the number of threads follows from, such as "4 cores with 8 CPUs, quota of 2.5 CPUs"."""
        cores, cpus = len(self.cores), len(self.allowed)
        said = f"{cores} core{'s' if cores > 1 else ''}" + (f" with {cpus} CPUs" if cpus > cores else "")
        return said + (f", quota of {self.quota:g} CPUs" if self.quota else "")


def usable_cpus(root: Path = Path("/"), allowed: Iterable[int] | None = None) -> Cpus:
    """The CPUs of this process; root: of the file system with /proc and /sys; allowed: in place of its affinity.

    A CPU whose core is unknown counts as a core. Outside Linux all of the machine's CPUs are allowed.
    """
    if allowed is None:
        allowed = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    of_core: dict[str, set[int]] = {}
    for cpu in sorted(allowed):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list") or str(cpu)
        of_core.setdefault(siblings, set()).add(cpu)
    return Cpus(tuple(map(frozenset, of_core.values())), _quota(root))


def _quota(root: Path) -> float | None:
    """The smallest CPU quota of this process's control groups and their ancestors, in version 1 or 2."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / name for name in (controllers, "cpu")]
        else:
            continue
        for mount in mounts:
            found += [quota for folder in _up(mount, path) if (quota := _quota_of(folder)) is not None]
    return min(found, default=None)


def _up(mount: Path, path: str) -> Iterator[Path]:
    """The folders of a control group and its ancestors. A container's own group is the mount itself."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _quota_of(folder: Path) -> float | None:
    values = _read(folder / "cpu.max").split() or [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    try:
        quota, period = map(float, values)
    except ValueError:  # no such files, or "max" for no limit
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def use_threads(count: int) -> None:
    """Compute with `count` threads, whatever the default is."""
    global _chosen
    _chosen = True
    torch.set_num_threads(count)


def use_default_threads(cpus: Cpus | None = None) -> str:
    """Lower torch's number of threads to the default, unless somebody chose one; return what the number follows from.

    Counts as chosen: COUNT_VARIABLES, `use_threads`, and a `torch.set_num_threads` of a number other than torch's own
    defaults, which are the allowed CPUs and their cores. Later calls of `torch.set_num_threads` have the last word.
    """
    cpus, present = cpus or usable_cpus(), torch.get_num_threads()
    asked = next((name for name in COUNT_VARIABLES if os.environ.get(name)), None)
    if asked is not None:
        return f"{asked} is set"
    if _chosen or present not in (len(cpus.allowed), len(cpus.cores), cpus.threads):
        return "chosen by --threads or torch.set_num_threads"
    if present > cpus.threads:
        torch.set_num_threads(cpus.threads)
        _log.info("computing with %d threads instead of %d: %s", cpus.threads, present, cpus.description)
    return cpus.description
