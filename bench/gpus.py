"""The chips that kernels are compiled for, and the products for which times are projected.

What every chip of a compute capability has in one multiprocessor is in `ARCHITECTURES`; what a product can do at most
is in `kernels/devices.py`.

Source: CUDA C++ Programming Guide, "Compute Capabilities" (technical specifications per compute capability).
"""

from dataclasses import dataclass

from ..kernels.devices import Device, device_named

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """One compute capability. registers, shared, warps, blocks: of one multiprocessor (32-bit registers, bytes);
    block_shared: bytes of shared memory that one block may have."""

    sm: int
    registers: int
    shared: int
    block_shared: int
    warps: int
    blocks: int

    @property
    def name(self) -> str:
        """As the compiler spells it: sm_90."""
        return f"sm_{self.sm}"


ARCHITECTURES = {
    architecture.sm: architecture
    for architecture in (
        Architecture(80, 65_536, 164 * KIB, 163 * KIB, warps=64, blocks=32),
        Architecture(86, 65_536, 100 * KIB, 99 * KIB, warps=48, blocks=16),
        Architecture(89, 65_536, 100 * KIB, 99 * KIB, warps=48, blocks=24),
        Architecture(90, 65_536, 228 * KIB, 227 * KIB, warps=64, blocks=32),
        Architecture(100, 65_536, 228 * KIB, 227 * KIB, warps=64, blocks=32),
        Architecture(120, 65_536, 100 * KIB, 99 * KIB, warps=48, blocks=24),
    )
}

# Shared memory that the system keeps for itself in each block, from compute capability 8.0 on.
RESERVED_SHARED = KIB
# Columns of tensor memory that one block may have on sm_100.
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Gpu:
    """A product for which times are projected. name: in the tables; sm: the code that it runs, 90 for sm_90."""

    name: str
    device: Device
    sm: int

    @property
    def peaks(self) -> dict[str, float]:
        """Operations/s of dense matrix products by dtype; tf32 runs at half the rate of bfloat16 on all of them."""
        flops = self.device.flops
        return {**{dtype: flops[dtype] for dtype in ("bfloat16", "float16", "int8")}, "tf32": flops["bfloat16"] / 2}

    def least_seconds(self, bytes: float, operations: float, dtype: str) -> tuple[float, str]:
        """The time below which this work cannot be done here, in seconds, and what sets it: "memory" or "compute"."""
        memory = bytes / self.device.bandwidth
        compute = operations / self.peaks[dtype] if operations else 0.0
        return max(memory, compute), "compute" if compute > memory else "memory"


GPUS = (
    Gpu("H100 SXM", device_named("H100 SXM"), 90),
    Gpu("A100 SXM", device_named("A100 80GB SXM"), 80),
    Gpu("RTX 5090", device_named("RTX 5090"), 120),
    Gpu("RTX 4090", device_named("RTX 4090"), 89),
    Gpu("RTX 3090", device_named("RTX 3090"), 86),
    Gpu("RTX 4060", device_named("RTX 4060 8GB"), 89),
)
