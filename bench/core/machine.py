"""The machine of a measurement, its software and clocks; and peaks of memory and energy.

Nothing here fails without a GPU, NVML, git or a known operating system: unknown values are None.
"""

import importlib
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGES = ("afnext", "torch", "triton", "transformers")
# The instruction sets that decide how fast products of small numbers and conversions are.
_ISA = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni"),
    *("amx_bf16", "amx_fp16", "amx_int8", "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2", "sme"),
)
_UNKNOWN_CACHE_BYTES = 64 << 20


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """The machine of a record, as plain JSON values.

    cpu, cores (usable by this process), threads (torch's), memory_bytes, isa, cache_bytes (last level), os, gpu (of
    `device`, by default the current one; None without), versions, commit and dirty (None outside a checkout), timestamp
    (UTC).
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit, dirty = checkout()
    return {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "isa": isa(),
        "cache_bytes": last_level_cache(torch.device("cpu")),
        "os": platform.platform(),
        "gpu": gpu(device),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "commit": commit,
        "dirty": dirty,
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def isa() -> list[str]:
    """The instruction sets of this CPU that matter to the kernels, as Linux names them; empty if unknown."""
    flags = set(re.findall(r"^(?:flags|Features)\s*:(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)[:1])
    known = set(" ".join(flags).split())
    return [name for name in _ISA if name in known]


def gpu(device: torch.device) -> dict[str, Any] | None:
    """Name, memory and compute capability of a CUDA device, with driver, clocks and power limit if NVML is
    available."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    described: dict[str, Any] = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    nvml = _nvml(device)
    if nvml is not None:
        library, handle = nvml
        described |= {
            "driver": _ask(library.nvmlSystemGetDriverVersion),
            "sm_mhz": _ask(library.nvmlDeviceGetClockInfo, handle, library.NVML_CLOCK_SM),
            "memory_mhz": _ask(library.nvmlDeviceGetClockInfo, handle, library.NVML_CLOCK_MEM),
            "max_sm_mhz": _ask(library.nvmlDeviceGetMaxClockInfo, handle, library.NVML_CLOCK_SM),
            "power_limit_mw": _ask(library.nvmlDeviceGetPowerManagementLimit, handle),
        }
    return described


def energy_joules(device: torch.device) -> float | None:
    """Energy the device has used since its driver was loaded, in joules; None for CPUs and if NVML does not report it.

    The difference of two readings is the energy used between them, idle power included.
    """
    nvml = _nvml(device)
    if nvml is None:
        return None
    library, handle = nvml
    millijoules = _ask(library.nvmlDeviceGetTotalEnergyConsumption, handle)
    return None if millijoules is None else float(millijoules) / 1000


def peak_rss() -> int | None:
    """Largest resident memory of this process, in bytes, since its start or `reset_peaks`; mapped files included.

    None on systems that do not account for it.
    """
    status = re.search(r"^VmHWM:\s*(\d+) kB", _read("/proc/self/status"), re.MULTILINE)
    if status:
        return int(status[1]) * 1024
    try:
        resource = importlib.import_module("resource")
    except ImportError:
        return None
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory(device: torch.device) -> int | None:
    """Most bytes that torch's tensors held on a CUDA device since `reset_peaks`; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peaks(device: torch.device) -> bool:
    """Reset the peaks of memory. Returns whether that of the process could be reset, which only Linux supports."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between `device` and its memory; 64 MiB if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_read(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [re.fullmatch(r"(\d+)([KMG])", size.strip()) for size in sizes]
    return max((int(size[1]) * units[size[2]] for size in found if size), default=_UNKNOWN_CACHE_BYTES)


def checkout() -> tuple[str | None, bool | None]:
    """The commit of this code and whether tracked files differ from it; None, None outside a git checkout."""
    if not (_REPOSITORY / ".git").exists():
        return None, None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@lru_cache(maxsize=8)
def _nvml(device: torch.device) -> tuple[Any, Any] | None:
    """NVML and its handle for a CUDA device, found by UUID since NVML counts devices in another order."""
    if device.type != "cuda":
        return None
    try:
        library = importlib.import_module("pynvml")
        library.nvmlInit()
        return library, library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # no module, library, device or permission: each raises another class
        return None


def _ask(question: Any, *arguments: Any) -> Any:
    """NVML's answer, or None where this device has none."""
    try:
        return question(*arguments)
    except Exception:
        return None


def _cpu_model() -> str:
    name = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
