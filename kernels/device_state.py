"""The state of a device: its compute capability, waiting for its work, its free memory."""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

TRITON_FLOOR = (8, 0)
"""The oldest compute capability of NVIDIA's GPUs for which Triton compiles tensor-core instructions."""


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None for any other device."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def runs_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on `device`: any GPU but NVIDIA's before compute capability 8.0."""
    return device.type == "cuda" and (capability(device) or TRITON_FLOOR) >= TRITON_FLOOR


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16: any but NVIDIA's GPUs before compute capability 8.0."""
    return (capability(device) or TRITON_FLOOR) >= TRITON_FLOOR


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current device inside a `with` block, as launches and captures need; nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launching(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function`, with its Triton launches sent to the GPU `device` whichever GPU is current."""

    def launch(*args: Any, **options: Any) -> Any:
        if device.index is None or torch.cuda.current_device() == device.index:
            return function(*args, **options)
        with current(device):
            return function(*args, **options)

    return launch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device` of a tensor in host memory, made without waiting for the GPU's queued work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on `device`, so that host clocks around it measure it. No-op on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`; for the CPU, what the system and the container allow."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"^MemAvailable:\s*(\d+) kB$", _contents("/proc/meminfo"), re.MULTILINE)
    if available:
        free = 1024 * int(available[1])
    limit = _contents("/sys/fs/cgroup/memory.max").strip()
    return min(free, int(limit)) if limit.isdecimal() else free


def _contents(path: str) -> str:
    """The text of a system file, empty if it does not exist."""
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
