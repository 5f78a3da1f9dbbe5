"""Compiles the native kernels: one shared library for each instruction-set level of this machine's architecture.

Every .cpp beside this file is compiled once for each level, with that level's flags, into libafnext_<level>.so. Levels
are separate libraries, and a process loads only the one for its level, so code shared through headers is never compiled
for a level that the CPU lacks. This file imports only the standard library, because setup.py runs it by itself.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVXVNNI = [*_AVX2, "-mavxvnni"]
_AVX512VNNI_PARTS = ("f", "bw", "vl", "dq", "vnni")
_AVX512VNNI = [*_AVX2, "-mprefer-vector-width=512", *(f"-mavx512{part}" for part in _AVX512VNNI_PARTS)]
_AVX512 = [*_AVX512VNNI, "-mavx512bf16"]
_AMX = [*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
_NEON = ["-DAFNEXT_NEON"]  # every CPU of the architecture has it; the portable level leaves its use to the compiler
_LEVELS = {
    "x86_64": {
        "portable": [],
        "avx2": _AVX2,
        "avxvnni": _AVXVNNI,
        "avx512vnni": _AVX512VNNI,
        "avx512": _AVX512,
        "amx": _AMX,
    },
    "aarch64": {
        "portable": [],
        "neon": _NEON,
        "neondot": [*_NEON, "-march=armv8.2-a+dotprod"],
        "i8mm": [*_NEON, "-march=armv8.2-a+dotprod+i8mm+bf16"],
    },
}
_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
# a * b + c may become one instruction; no other optimization that changes results is allowed.
_FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS += [
    "-Wall",
    "-Wno-uninitialized",
    "-Wno-unknown-warning-option",
    "-Wno-maybe-uninitialized",
]  # of gcc 12's own intrinsics
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]


class BuildError(Exception):
    """The native kernels cannot be compiled here: no compiler, or it fails."""


def levels(machine: str | None = None) -> dict[str, list[str]]:
    """The instruction-set levels of an architecture, by default this machine's, lowest first, with compiler flags."""
    machine = machine or platform.machine()
    return _LEVELS.get(_MACHINES.get(machine, machine), {"portable": []})


def library_name(level: str) -> str:
    """The file that holds the kernels of a level."""
    return f"libafnext_{level}.so"


def sources() -> list[Path]:
    """The .cpp files, in order; empty in an installed package, which has only the libraries."""
    return sorted(HERE.glob("*.cpp"))


def headers() -> list[Path]:
    """The headers of the sources."""
    return sorted(HERE.glob("*.h"))


def fingerprint() -> str:
    """A hash of sources and flags. The libraries store it, so that a stale library is noticed."""
    files = [*headers(), *sources(), Path(__file__)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def build(folder: Path, objects: Path, extra_flags: list[str] | None = None) -> list[Path]:
    """Compile changed sources into `objects` and link the libraries into `folder`; return the libraries.

    The compiler is $CXX, else $CC, else the first of c++, g++ and clang++ found, and the levels are those of the
    architecture that it compiles for. Raises BuildError if it fails.
    """
    compiler = _compiler()
    target = _target(compiler)
    compile_openmp, link_openmp = openmp_flags(target)
    flags = [*_FLAGS, *compile_openmp, *(extra_flags or [])]
    commands: list[list[str]] = []
    links: list[list[str]] = []
    libraries = []
    for level, level_flags in levels(target.partition("-")[0]).items():
        made = objects / level
        made.mkdir(parents=True, exist_ok=True)
        parts = []
        for source in sources():
            part = made / f"{source.stem}.o"
            parts.append(str(part))
            command = [*compiler, *flags, *level_flags, f'-DAFNEXT_LEVEL="{level}"', "-c", str(source), "-o", str(part)]
            if source.stem == "library":
                command.insert(-4, f'-DAFNEXT_FINGERPRINT="{fingerprint()}"')
            if source.stem == "library" or _older(part, [source, *headers(), Path(__file__)]):
                commands.append(command)
        library = folder / library_name(level)
        libraries.append(library)
        # Link to another name and rename: a process that has mapped the old library keeps it intact.
        links.append([*compiler, *flags, *link_openmp, "-shared", *parts, "-o", f"{library}.new"])
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        list(workers.map(_run, commands))
        list(workers.map(_run, links))
    for library in libraries:
        os.replace(f"{library}.new", library)
    return libraries


def openmp_flags(target: str) -> tuple[list[str], list[str]]:
    """Flags to compile, and further ones to link, with OpenMP for a target such as "aarch64-linux-gnu".

    On macOS the libraries link to no OpenMP: two copies in one process abort it, so the libraries use torch's, which
    `native/__init__.py` makes visible. Apple's clang takes the flag only through -Xpreprocessor, and has no omp.h.
    """
    if "apple" in target:
        return ["-Xpreprocessor", "-fopenmp"], ["-undefined", "dynamic_lookup"]
    return ["-fopenmp"], []


def _target(compiler: list[str]) -> str:
    """The compiler's target, such as "x86_64-linux-gnu"; this machine's if the compiler does not say."""
    try:
        said = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=False)
    except OSError:
        return platform.machine()  # compiling will fail with a reason
    return said.stdout.strip() or platform.machine()


def _older(part: Path, inputs: list[Path]) -> bool:
    return not part.exists() or part.stat().st_mtime < max(file.stat().st_mtime for file in inputs)


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX") or os.environ.get("CC")
    if chosen:
        return shlex.split(chosen)
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise BuildError("no C++ compiler was found (c++, g++ or clang++, or $CXX)")
    return [found]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed with status {done.returncode}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


if __name__ == "__main__":  # build.py FOLDER OBJECTS [FLAG ...]: the sanitizers' build of `make sanitize`
    build(Path(sys.argv[1]), Path(sys.argv[2]), SANITIZE if "--sanitize" in sys.argv[3:] else None)
