"""Kernels compiled ahead of time for chips that this machine lacks, and the resources of their machine code.

Registers, stack and instructions are read from the finished binary (`cuobjdump`, `nvdisasm`, both come with Triton), of
AMD's chips from the assembly; residency follows from the limits in `kernels/chips.py`. The compiler does not check
shared memory against the chip's limit, only loading does, so `violations` checks it.
"""

import copyreg
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ...kernels import chips
from ...kernels.chips import CHIPS, TENSOR_MEMORY_COLUMNS, Chip
from .trace import Specialization

AMD = "gfx942"
TARGETS = tuple(chip.target for chip in CHIPS.values())

# Of the tensor cores: warp, warp-group and (on sm_100) tensor-memory products, by operand type.
_TENSOR_CORE = re.compile(r"\b((?:H|I|Q|O|D|HG|IG|QG)MMA|UTC\w*MMA)\b")
_DOT = re.compile(r"\btt\.dot(_scaled)?\b")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_AMD_MATRIX = re.compile(r"\bv_(mfma_\w+)\b")
_AMD_USAGE = re.compile(r"\.(vgpr_count|private_segment_fixed_size|vgpr_spill_count):\s*(\d+)")
_LOCAL_ARRAY = re.compile(r"\.local .*__local_depot\d+\[(\d+)\]")
_REGISTERS_PER_ALLOCATION = 8  # of a thread; warps come in fours, one for each part of the multiprocessor


@dataclass(frozen=True)
class Resources:
    """The resources of one kernel on one chip, or why it does not compile.

    registers: per thread; stack: bytes per thread, of which `spills` are not arrays in the source (the range reduction
    of an accurate sin or cos has one of 28 bytes); shared: bytes per block; tensor_memory: columns per block; warps:
    per block; blocks: resident in one multiprocessor; instructions: of the tensor cores, by name; has_dot:
    whether the source multiplies matrices. On AMD's chips registers are vector registers, and a spill of a scalar one,
    which goes to a vector register, does not count.
    """

    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    warps: int = 0
    blocks: int = 0
    instructions: dict[str, int] | None = None
    has_dot: bool = False
    error: str = ""

    def occupancy(self, target: str) -> float:
        """Resident warps as a share of those that a multiprocessor of `target` could hold."""
        return self.blocks * self.warps / chip_of(target).warps

    def as_dict(self, target: str) -> dict[str, Any]:
        """The resources on `target`, by name."""
        if self.error:
            return {"compiles": False, "error": self.error}
        known = {name: value for name, value in asdict(self).items() if name != "error"}
        return {"compiles": True, **known, "occupancy": self.occupancy(target)}


def chip_of(target: str) -> Chip:
    """The limits of one of `TARGETS`, such as sm_90."""
    return CHIPS[target.replace("_", "")]


def compile_all(
    jobs: Iterable[tuple[Specialization, str]],
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cache: Path | None = None,
) -> dict[tuple[str, str], Resources]:
    """Compile each specialization for its target (one of `TARGETS`) and read its resources.

    workers: processes, started at low priority; 0 compiles in this one. progress: called with (done, total). cache:
    folder of earlier results, reused while sources and compiler are the same; the user's by default.
    Returns the resources by (digest of the specialization, target).
    """
    wanted = {(specialization.digest, target): specialization for specialization, target in jobs}
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "afnext" / "codegen"
    found = {key: known for key in wanted if (known := _remembered(folder, key)) is not None}
    progress(len(found), len(wanted))
    missing = {key: specialization for key, specialization in wanted.items() if key not in found}
    for key, resources in _compiled(missing, min(workers, len(missing))):
        found[key] = resources
        _remember(folder, key, resources)
        progress(len(found), len(wanted))
    return found


def compile_one(specialization: Specialization, target: str) -> Resources:
    """Compile for one target, in this process. A failure of the compiler is a result, in `error`."""
    options: dict[str, Any] = {**specialization.options, "enable_fp_fusion": True}
    chip = GPUTarget("hip", AMD, 64) if target == AMD else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source = ASTSource(
        specialization.kernel, specialization.signature, specialization.constexprs, specialization.attributes
    )
    try:
        compiled = triton.compile(source, target=chip, options=options)
    except Exception as error:  # of whatever pass of the compiler
        return Resources(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
    return (_amd_resources if target == AMD else _resources)(compiled, chip_of(target))


def violations(resources: Resources, target: str) -> list[str]:
    """The violations of a kernel on a target, one phrase each; empty if there are none."""
    if resources.error:
        return [f"does not compile: {resources.error}"]
    limit, found = chip_of(target).block_shared, []
    if resources.spills:
        found.append(f"spills {resources.spills} bytes of registers a thread")
    if resources.shared > limit:
        found.append(f"takes {resources.shared} bytes of shared memory, a block may have {limit}")
    if resources.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"takes {resources.tensor_memory} of {TENSOR_MEMORY_COLUMNS} columns of tensor memory")
    if resources.has_dot and not resources.instructions:
        found.append("multiplies matrices without a tensor-core instruction")
    return found


def resident_blocks(chip: Chip, *, registers: int, shared: int, warps: int) -> int:
    """Number of blocks of a kernel resident in one multiprocessor; 0 if not even one fits."""
    if shared > chip.block_shared:
        return 0
    warp_registers = -(-max(registers, 1) // _REGISTERS_PER_ALLOCATION) * _REGISTERS_PER_ALLOCATION * chip.lanes
    by_registers = chip.registers // 4 // warp_registers * 4 // warps
    by_shared = chip.shared // (shared + chip.reserved) if shared + chip.reserved else chip.blocks
    return min(by_registers, by_shared, chip.warps // warps, chip.blocks)


def _resources(compiled: Any, chip: Chip) -> Resources:
    usage, assembly = _disassembled(compiled.asm["cubin"])
    match = _USAGE.search(usage)
    if match is None:
        return Resources(error="cuobjdump does not tell the resource usage of the binary")
    registers, stack = int(match[1]), int(match[2])
    arrays = sum(int(size) for size in _LOCAL_ARRAY.findall(compiled.asm["ptx"]))
    instructions: dict[str, int] = {}
    for name in _TENSOR_CORE.findall(assembly):
        instructions[name] = instructions.get(name, 0) + 1
    metadata = compiled.metadata
    return Resources(
        registers=registers,
        stack=stack,
        spills=max(0, stack - (arrays + 7) // 8 * 8),
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        warps=metadata.num_warps,
        blocks=resident_blocks(chip, registers=registers, shared=metadata.shared, warps=metadata.num_warps),
        instructions=instructions,
        has_dot=bool(_DOT.search(compiled.asm["ttir"])),
    )


def _amd_resources(compiled: Any, chip: Chip) -> Resources:
    assembly, metadata = compiled.asm["amdgcn"], compiled.metadata
    usage = {name: int(value) for name, value in _AMD_USAGE.findall(assembly)}
    instructions: dict[str, int] = {}
    for name in _AMD_MATRIX.findall(assembly):
        instructions[name] = instructions.get(name, 0) + 1
    registers, shared, warps = usage["vgpr_count"], metadata.shared, metadata.num_warps
    return Resources(
        registers=registers,
        stack=usage["private_segment_fixed_size"],
        spills=4 * usage["vgpr_spill_count"],
        shared=shared,
        warps=warps,
        blocks=resident_blocks(chip, registers=registers, shared=shared, warps=warps),
        instructions=instructions,
        has_dot=bool(_DOT.search(compiled.asm["ttir"])),
    )


def _disassembled(binary: bytes) -> tuple[str, str]:
    """The resource usage and the instructions of a binary, as the vendor's tools print them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        return usage, _output(knobs.nvidia.nvdisasm.path, "-c", str(path))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compiled(
    missing: dict[tuple[str, str], Specialization], workers: int
) -> Iterable[tuple[tuple[str, str], Resources]]:
    if workers == 0:
        yield from ((key, compile_one(specialization, key[1])) for key, specialization in missing.items())
        return
    # New processes, because a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_lower_priority) as pool:
        running = {pool.submit(compile_one, specialization, key[1]): key for key, specialization in missing.items()}
        for done in as_completed(running):
            yield running[done], done.result()


def _lower_priority() -> None:
    os.nice(max(0, 10 - os.nice(0)))


def _kernel(module: str, name: str) -> JITFunction:
    """The kernel of that name, without its decorators."""
    found = reduce(getattr, name.split("."), importlib.import_module(module))
    while not isinstance(found, JITFunction):
        found = found.fn
    return found


# A kernel is passed to another process by name.
copyreg.pickle(JITFunction, lambda kernel: (_kernel, (kernel.__module__, kernel.__qualname__)))

_READER = hashlib.sha256(Path(__file__).read_bytes() + Path(chips.__file__).read_bytes()).hexdigest()


def _file(folder: Path, key: tuple[str, str]) -> Path:
    digest = hashlib.sha256(repr((key, triton.__version__, _READER)).encode()).hexdigest()
    return folder / f"{digest}.json"


def _remembered(folder: Path, key: tuple[str, str]) -> Resources | None:
    try:
        return Resources(**json.loads(_file(folder, key).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _remember(folder: Path, key: tuple[str, str], resources: Resources) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = _file(folder, key)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(resources)))
    unfinished.replace(path)
