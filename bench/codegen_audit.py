"""Kernels compiled ahead of time for chips that are not here, and what their machine code uses of them.

Registers, stack and instructions are read from the finished binary (`cuobjdump`, `nvdisasm`, both come with Triton);
residency follows from the limits in `gpus.py`. The compiler does not check shared memory against a chip, only loading
does, so `violations` checks it here.
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

from .codegen_trace import Specialization
from .gpus import ARCHITECTURES, RESERVED_SHARED, TENSOR_MEMORY_COLUMNS, Architecture

AMD = "gfx942"
TARGETS = (*(architecture.name for architecture in ARCHITECTURES.values()), AMD)

# Of the tensor cores: warp, warp-group and (on sm_100) tensor-memory products, by operand type.
_TENSOR_CORE = re.compile(r"\b((?:H|I|Q|O|D|HG|IG|QG)MMA|UTC\w*MMA)\b")
_DOT = re.compile(r"\btt\.dot(_scaled)?\b")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_LOCAL_ARRAY = re.compile(r"\.local .*__local_depot\d+\[(\d+)\]")
_REGISTERS_PER_ALLOCATION = 256  # of one warp, and warps come in fours, one for each part of the multiprocessor


@dataclass(frozen=True)
class Resources:
    """What one kernel uses on one chip, or why it does not compile.

    registers: a thread; stack: bytes a thread, of which `spills` are not arrays that the source asks for (the range
    reduction of an accurate sin or cos keeps one of 28 bytes); shared: bytes a block; tensor_memory: columns a block;
    warps: a block; blocks: resident in one multiprocessor; instructions: of the tensor cores, by name; has_dot:
    whether the source multiplies matrices. Of AMD's chips only `error` is told.
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
        return self.blocks * self.warps / architecture_of(target).warps

    def as_dict(self, target: str) -> dict[str, Any]:
        """What is known of it on `target`, by name."""
        if self.error or target == AMD:
            return {"compiles": not self.error, "error": self.error}
        known = {name: value for name, value in asdict(self).items() if name != "error"}
        return {"compiles": True, **known, "occupancy": self.occupancy(target)}


def architecture_of(target: str) -> Architecture:
    """The limits of one of NVIDIA's `TARGETS`, such as sm_90."""
    return ARCHITECTURES[int(target.removeprefix("sm_"))]


def compile_all(
    jobs: Iterable[tuple[Specialization, str]],
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cache: Path | None = None,
) -> dict[tuple[str, str], Resources]:
    """Compile each specialization for its target (one of `TARGETS`) and read what came out.

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
    chip = GPUTarget("hip", AMD, 64) if target == AMD else GPUTarget("cuda", architecture_of(target).sm, 32)
    source = ASTSource(
        specialization.kernel, specialization.signature, specialization.constexprs, specialization.attributes
    )
    try:
        compiled = triton.compile(source, target=chip, options=options)
    except Exception as error:  # of whatever pass of the compiler
        return Resources(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
    return Resources() if target == AMD else _resources(compiled, architecture_of(target))


def violations(resources: Resources, target: str) -> list[str]:
    """What is wrong with a kernel on a target, each as a phrase; empty for a kernel that may ship."""
    if target == AMD:
        return []
    if resources.error:
        return [f"does not compile: {resources.error}"]
    limit, found = architecture_of(target).block_shared, []
    if resources.spills:
        found.append(f"spills {resources.spills} bytes of registers a thread")
    if resources.shared > limit:
        found.append(f"takes {resources.shared} bytes of shared memory, a block may have {limit}")
    if resources.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"takes {resources.tensor_memory} of {TENSOR_MEMORY_COLUMNS} columns of tensor memory")
    if resources.has_dot and not resources.instructions:
        found.append("multiplies matrices without a tensor-core instruction")
    return found


def resident_blocks(architecture: Architecture, *, registers: int, shared: int, warps: int) -> int:
    """How many blocks of a kernel one multiprocessor holds at a time; 0 when not even one fits."""
    if shared > architecture.block_shared:
        return 0
    warp_registers = -(-max(registers, 1) * 32 // _REGISTERS_PER_ALLOCATION) * _REGISTERS_PER_ALLOCATION
    by_registers = architecture.registers // 4 // warp_registers * 4 // warps
    by_shared = architecture.shared // (shared + RESERVED_SHARED)
    return min(by_registers, by_shared, architecture.warps // warps, architecture.blocks)


def _resources(compiled: Any, architecture: Architecture) -> Resources:
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
        blocks=resident_blocks(architecture, registers=registers, shared=metadata.shared, warps=metadata.num_warps),
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
    # Fresh processes: a fork of one that has threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_lower_priority) as pool:
        running = {pool.submit(compile_one, specialization, key[1]): key for key, specialization in missing.items()}
        for done in as_completed(running):
            yield running[done], done.result()


def _lower_priority() -> None:
    os.nice(max(0, 10 - os.nice(0)))


def _kernel(module: str, name: str) -> JITFunction:
    """The kernel of that name, without what decorates it."""
    found = reduce(getattr, name.split("."), importlib.import_module(module))
    while not isinstance(found, JITFunction):
        found = found.fn
    return found


# A kernel travels to another process as its name.
copyreg.pickle(JITFunction, lambda kernel: (_kernel, (kernel.__module__, kernel.__qualname__)))

_READER = hashlib.sha256(Path(__file__).read_bytes() + Path(__file__).with_name("gpus.py").read_bytes()).hexdigest()


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
