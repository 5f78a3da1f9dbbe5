"""What NVIDIA's chips can hold and do at most, as the vendor's documents say.

Two tables: what every chip of a compute capability has in one multiprocessor (`ARCHITECTURES`), and the products for
which times are projected (`GPUS`). Peaks are those of dense matrices with float32 (int8: int32) accumulation at the
boost clock; tf32 runs at half the rate of bfloat16 on all of them.

Sources: CUDA C++ Programming Guide, "Compute Capabilities" (technical specifications per compute capability); for the
products the document named in `source`.
"""

from dataclasses import dataclass

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
    """One product. memory: bytes; bandwidth: bytes/s; peaks: operations/s of dense matrix products by dtype."""

    name: str
    sm: int
    multiprocessors: int
    memory: float
    bandwidth: float
    peaks: dict[str, float]
    source: str

    def least_seconds(self, bytes: float, operations: float, dtype: str) -> tuple[float, str]:
        """The time below which this work cannot be done here, in seconds, and what sets it: "memory" or "compute"."""
        memory = bytes / self.bandwidth
        compute = operations / self.peaks[dtype] if operations else 0.0
        return max(memory, compute), "compute" if compute > memory else "memory"


def _gpu(
    name: str,
    sm: int,
    multiprocessors: int,
    memory: float,
    bandwidth: float,
    bfloat16: float,
    int8: float,
    source: str,
) -> Gpu:
    """memory in GB, bandwidth in GB/s, the peaks in 1e12 operations/s."""
    peaks = {"bfloat16": bfloat16 * 1e12, "float16": bfloat16 * 1e12, "int8": int8 * 1e12, "tf32": bfloat16 / 2 * 1e12}
    return Gpu(name, sm, multiprocessors, memory * 1e9, bandwidth * 1e9, peaks, source)


_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"

GPUS = (
    _gpu("H100 SXM", 90, 132, 80, 3350, 989.4, 1978.9, "NVIDIA H100 Tensor Core GPU datasheet"),
    _gpu("A100 SXM", 80, 108, 80, 2039, 312, 624, "NVIDIA A100 80GB Tensor Core GPU datasheet"),
    _gpu("RTX 5090", 120, 170, 32, 1792, 209.5, 838, _BLACKWELL),
    _gpu("RTX 4090", 89, 128, 24, 1008, 165.2, 660.6, _ADA),
    _gpu("RTX 3090", 86, 82, 24, 936, 71, 284, "NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A"),
    # The product page gives 242 AI TOPS: int8 with sparsity. Half of it is dense, and a quarter of that is bfloat16
    # with float32 accumulation, the same ratios as in the whitepaper's table for the other chips of this architecture.
    _gpu("RTX 4060", 89, 24, 8, 272, 30.2, 121, "NVIDIA GeForce RTX 4060 product page"),
)
