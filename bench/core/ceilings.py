"""The ceilings of this machine, measured rather than from a data sheet: memory bandwidth and matrix products.

    copy   y = x                   bytes = 2 * size          read   sum(x)          bytes = size
    matmul n x n times n x n       operations = 2 * n^3      in float32, bfloat16, int8, and float16 on GPUs

The best sample counts, because a ceiling is an upper bound. Buffers are larger than the last-level cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .machine import last_level_cache
from .roofline import least_seconds
from .timing import clock_for, measure_interleaved

_LONGEST_PRODUCT = 1.0  # seconds
_LARGEST_BUFFER = 1 << 30


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes/s read and written; read: bytes/s read; flops: operations/s of matrix products by dtype."""

    copy: float
    read: float
    flops: dict[str, float]

    @property
    def bandwidth(self) -> float:
        """The larger of the two bandwidths, bytes/s."""
        return max(self.copy, self.read)

    def least_seconds(self, flops: float, bytes: float, dtype: str) -> tuple[float, str]:
        """The least time of such a kernel on this machine, in seconds, and its limit: "compute" or "memory".

        A dtype without a measured product has only the limit of memory.
        """
        return least_seconds(flops, bytes, self.flops.get(dtype), self.bandwidth)

    def percent(self, seconds: float, flops: float, bytes: float, dtype: str) -> float:
        """The percentage of the ceiling that a kernel of `seconds` reaches; 100 is the fastest possible."""
        return 100 * self.least_seconds(flops, bytes, dtype)[0] / seconds

    def values(self) -> dict[str, float]:
        """The figures of a record: copy_bytes_per_s, read_bytes_per_s and <dtype>_flops_per_s."""
        products = {f"{dtype}_flops_per_s": rate for dtype, rate in self.flops.items()}
        return {"copy_bytes_per_s": self.copy, "read_bytes_per_s": self.read, **products}


def measured_ceilings(device: torch.device, *, quick: bool = False) -> Ceilings:
    """Measure `device` with torch's current number of threads; once per process, then cached.

    quick: small buffers and products, for trials; the figures are then those of the caches.
    """
    return _measured(device, torch.get_num_threads(), quick)


def uncached_bytes(device: torch.device) -> int:
    """The size of a buffer that is read from memory, not from the caches of `device`."""
    return min(_LARGEST_BUFFER, max(256 << 20, 2 * last_level_cache(device)))


@lru_cache(maxsize=16)
def _measured(device: torch.device, _threads: int, quick: bool) -> Ceilings:
    size = 1 << 20 if quick else uncached_bytes(device)
    side = 128 if quick else (8192 if device.type == "cuda" else 3072)
    copy, read = _bandwidths(device, size)
    measured = {name: _product_rate(device, name, side) for name in _dtypes(device)}
    rates = {name: rate for name, rate in measured.items() if rate is not None}
    # A CPU without instructions for a dtype can still widen it to float32, which torch's own products may not do.
    least = rates.get("float32", 0.0) if device.type == "cpu" else 0.0
    return Ceilings(copy, read, {name: max(rate, least) for name, rate in rates.items()})


def _bandwidths(device: torch.device, size: int) -> tuple[float, float]:
    """Bytes/s of copying and of reading `size` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copying = _best(device, lambda: target.copy_(source))
    # The fastest reduction depends on the machine; the ceiling is the better one.
    reading = min(_best(device, source.sum), _best(device, lambda: torch.dot(source, source)))
    return 2 * size / copying, size / reading


def _best(device: torch.device, call: Callable[[], Any]) -> float:
    samples = measure_interleaved({"": call}, repeats=5, min_time=0.1, max_time=3.0, clock=clock_for(device))
    return samples[""].min


def _product_rate(device: torch.device, dtype: str, side: int) -> float | None:
    """FLOP/s of a product of `side` by `side` matrices, or None if torch lacks that dtype on that device.

    Smaller ones are tried first: torch's int8 product takes minutes at full size on CPUs without VNNI.
    """
    size = max(side // 8, min(side, 128))
    while (call := _product(device, dtype, size)) is not None:
        larger = min(2 * size, side)
        if size == side or clock_for(device).seconds(call) * (larger / size) ** 3 > _LONGEST_PRODUCT:
            return 2 * size**3 / _best(device, call)
        size = larger
    return None


def _dtypes(device: torch.device) -> tuple[str, ...]:
    gpu_only = ("float16",) if device.type == "cuda" else ()
    return ("float32", "bfloat16", *gpu_only, "int8")


def _product(device: torch.device, dtype: str, side: int) -> Callable[[], Any] | None:
    """The product of two matrices, or None if torch lacks that dtype on that device."""
    if dtype == "int8":
        integers = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
        product = getattr(torch, "_int_mm", None)  # its only product of int8 matrices with int32 sums
        call = None if product is None else lambda: product(integers, integers.T)
    else:
        numbers = torch.randn(side, side, device=device).to(getattr(torch, dtype))
        call = lambda: numbers @ numbers.T  # noqa: E731 - both branches name the same thing
    try:
        return call if call is not None and call() is not None else None
    except RuntimeError:
        return None
