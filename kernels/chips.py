"""The chip families that the Triton kernels are configured, compiled and audited for: one table of their limits.

Source: CUDA C++ Programming Guide, "Compute Capabilities" (technical specifications per compute capability), AMD's
"Instinct MI300 CDNA3 Instruction Set Architecture", and the product pages for the number of multiprocessors.
"""

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """Limits of one family.

    multiprocessors: of its typical product; block_shared: bytes of shared memory per block. Per multiprocessor:
    registers (of 32 bits), shared (bytes), warps, blocks. lanes: threads per warp; reserved: bytes of shared memory per
    block that the system uses; e4m3: whether the tensor cores multiply this 8-bit float.
    """

    name: str
    multiprocessors: int
    block_shared: int
    registers: int
    shared: int
    warps: int
    blocks: int
    lanes: int = 32
    reserved: int = KIB
    e4m3: bool = False

    @property
    def target(self) -> str:
        """The name as the compiler spells it: sm_90, gfx942."""
        return self.name.replace("sm", "sm_")


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm80", 108, 163 * KIB, 65_536, 164 * KIB, warps=64, blocks=32),  # A100
        Chip("sm86", 84, 99 * KIB, 65_536, 100 * KIB, warps=48, blocks=16),  # RTX A6000
        Chip("sm89", 128, 99 * KIB, 65_536, 100 * KIB, warps=48, blocks=24, e4m3=True),  # RTX 4090
        Chip("sm90", 132, 227 * KIB, 65_536, 228 * KIB, warps=64, blocks=32, e4m3=True),  # H100
        Chip("sm100", 148, 227 * KIB, 65_536, 228 * KIB, warps=64, blocks=32, e4m3=True),  # B200
        Chip("sm120", 170, 99 * KIB, 65_536, 100 * KIB, warps=48, blocks=24, e4m3=True),  # RTX 5090
        Chip("gfx942", 304, 64 * KIB, 131_072, 64 * KIB, warps=32, blocks=32, lanes=64, reserved=0),  # MI300X
    )
}

# Columns of tensor memory that one block may have on sm_100.
TENSOR_MEMORY_COLUMNS = 512
