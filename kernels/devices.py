"""Peak rates and memory of known GPUs, from their datasheets: for memory plans, "% of limit", and projections.

Every rate is dense, without the factor of two for 2:4 sparsity that datasheets print. float16, bfloat16, int8 and fp8
(e4m3) are the tensor cores' rates, with float32 accumulation for floats: the runtime uses no other, and on GeForce
cards it is half as fast as the float16 accumulation of the headline figure. float32 is the CUDA cores' rate, since
nothing here computes in TF32. A dtype that the tensor cores lack is absent. Memory is the nominal size with 10^9 bytes
per GB, within a tenth of what torch reports.

Source: the NVIDIA datasheet or architecture whitepaper named with each device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .errors import AfnextError

_MEMORY_TOLERANCE = 0.15  # nominal against reported bytes


class DeviceError(AfnextError):
    """A device is unknown, or cannot compute in the dtype asked for."""


@dataclass(frozen=True)
class Device:
    """name: the common name; reported: the name that `torch.cuda.get_device_name` returns; flops: dense FLOP/s by
    dtype; bandwidth: bytes/s; memory: bytes; source: of the figures."""

    name: str
    reported: tuple[str, ...]
    flops: Mapping[str, float]
    bandwidth: float
    memory: int
    source: str


def _device(
    name: str,
    *reported: str,
    tera: tuple[float, float, float | None, float, float | None],
    gigabytes_per_s: float,
    gigabytes: int,
    source: str,
) -> Device:
    """tera: 10^12 operations/s in float32, float16, bfloat16, int8, fp8 (None where the tensor cores lack a dtype)."""
    dtypes = ("float32", "float16", "bfloat16", "int8", "fp8")
    flops = {dtype: rate * 1e12 for dtype, rate in zip(dtypes, tera, strict=True) if rate is not None}
    return Device(name, reported, MappingProxyType(flops), gigabytes_per_s * 1e9, gigabytes * 10**9, source)


DEVICES = (
    _device(
        "H100 SXM",
        "NVIDIA H100 80GB HBM3",
        tera=(66.9, 989.4, 989.4, 1978.9, 1978.9),
        gigabytes_per_s=3350,
        gigabytes=80,
        source="NVIDIA H100 Tensor Core GPU architecture whitepaper and datasheet, H100 SXM5",
    ),
    _device(
        "H100 PCIe",
        "NVIDIA H100 PCIe",
        tera=(51.2, 756.0, 756.0, 1513.0, 1513.0),
        gigabytes_per_s=2000,
        gigabytes=80,
        source="NVIDIA H100 Tensor Core GPU architecture whitepaper and datasheet, H100 PCIe",
    ),
    _device(
        "H200",
        "NVIDIA H200",
        tera=(66.9, 989.4, 989.4, 1978.9, 1978.9),
        gigabytes_per_s=4800,
        gigabytes=141,
        source="NVIDIA H200 Tensor Core GPU datasheet, H200 SXM",
    ),
    _device(
        "A100 80GB SXM",
        "NVIDIA A100-SXM4-80GB",
        tera=(19.5, 312.0, 312.0, 624.0, None),
        gigabytes_per_s=2039,
        gigabytes=80,
        source="NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM",
    ),
    _device(
        "L4",
        "NVIDIA L4",
        tera=(30.3, 121.0, 121.0, 242.0, 242.0),
        gigabytes_per_s=300,
        gigabytes=24,
        source="NVIDIA L4 Tensor Core GPU datasheet, its rates with sparsity halved",
    ),
    _device(
        "T4",
        "Tesla T4",
        "NVIDIA T4",
        tera=(8.1, 65.0, None, 130.0, None),
        gigabytes_per_s=320,
        gigabytes=16,
        source="NVIDIA T4 Tensor Core GPU datasheet",
    ),
    _device(
        "RTX 3060 12GB",
        "NVIDIA GeForce RTX 3060",
        tera=(12.7, 25.5, 25.5, 101.9, None),
        gigabytes_per_s=360,
        gigabytes=12,
        source="NVIDIA GA102 architecture whitepaper, rates a core for 28 cores at the product page's 1.777 GHz",
    ),
    _device(
        "RTX 3090",
        "NVIDIA GeForce RTX 3090",
        tera=(35.6, 71.0, 71.0, 284.0, None),
        gigabytes_per_s=936,
        gigabytes=24,
        source="NVIDIA GA102 architecture whitepaper, GeForce RTX 3090",
    ),
    _device(
        "RTX 4060 8GB",
        "NVIDIA GeForce RTX 4060",
        tera=(15.1, 30.2, 30.2, 120.9, 60.4),
        gigabytes_per_s=272,
        gigabytes=8,
        source="NVIDIA Ada architecture whitepaper, rates a core for 24 cores at the product page's 2.46 GHz",
    ),
    _device(
        "RTX 4090",
        "NVIDIA GeForce RTX 4090",
        tera=(82.6, 165.2, 165.2, 660.6, 330.3),
        gigabytes_per_s=1008,
        gigabytes=24,
        source="NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090",
    ),
    _device(
        "RTX 5090",
        "NVIDIA GeForce RTX 5090",
        tera=(104.8, 209.5, 209.5, 838.0, 419.0),
        gigabytes_per_s=1792,
        gigabytes=32,
        source="NVIDIA RTX Blackwell GPU architecture whitepaper, GeForce RTX 5090",
    ),
)


def find_device(reported: str, memory: int | None = None) -> Device | None:
    """The device that torch calls `reported`, or None for one that is not in the table.

    Names are compared whole: a Ti, a laptop or an NVL card and a MIG slice are different devices. `memory`, in bytes as
    torch reports it, distinguishes cards that share a name.
    """
    for device in DEVICES:
        if reported.strip() in device.reported:
            fits = memory is None or abs(memory / device.memory - 1) <= _MEMORY_TOLERANCE
            return device if fits else None
    return None


def device_named(name: str) -> Device:
    """The device with the common name `name`, ignoring case and spaces; its first words suffice ("rtx3060", "h100").

    If several devices with the same memory match, returns the first in the table. Raises DeviceError, listing the
    choices, for an unknown name and for one that matches devices with different memory ("rtx").
    """
    wanted = _joined(name)
    found = [device for device in DEVICES if _joined(device.name) == wanted] or [
        device for device in DEVICES if wanted in _beginnings(device.name)
    ]
    if len({device.memory for device in found}) != 1:
        choices = ", ".join(device.name for device in found or DEVICES)
        raise DeviceError(f"{'ambiguous' if found else 'unknown'} device {name!r}; choose one of {choices}")
    return found[0]


def _joined(name: str) -> str:
    return "".join(name.lower().split())


def _beginnings(name: str) -> set[str]:
    words = name.lower().split()
    return {"".join(words[:count]) for count in range(1, len(words))}
