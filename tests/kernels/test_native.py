"""The compiled kernels: how they are built, found and chosen, and that they touch no memory but their own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.accuracy import DTYPES, native_backends, poisoned

from afnext import kernels
from afnext.bench.ops.guarded import guarded
from afnext.kernels import activation, native, norm
from afnext.kernels.activation import gelu, swiglu
from afnext.kernels.errors import BackendError
from afnext.kernels.native import build
from afnext.kernels.norm import add_layer_norm, rms_norm

ROOT = Path(__file__).parents[2]
COMPILERS = (os.environ.get("CXX") or os.environ.get("CC") or "c++ g++ clang++").split()
needs_native = pytest.mark.skipif(not native.AVAILABLE, reason="the native kernels are not built")


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler on this machine")
def test_they_are_built_where_there_is_a_compiler() -> None:
    assert native.AVAILABLE, "run `make native`"
    assert native.supported_levels()[0] == "portable"
    assert native.isa() == os.environ.get("AFNEXT_ISA", native.best_level())


@needs_native
def test_the_level_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for level in native.supported_levels():
        monkeypatch.setenv("AFNEXT_ISA", level)
        assert native.isa() == level
    monkeypatch.setenv("AFNEXT_ISA", "sse9")
    with pytest.raises(BackendError, match=r"AFNEXT_ISA=sse9.*portable"):
        rms_norm(torch.ones(2, 8), torch.ones(8))


@pytest.mark.parametrize(("faster", "level"), [(1, "avx512"), (0, "avx512vnni")])
def test_the_level_is_the_one_that_pays(faster: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not AVX512-BF16 where the CPU takes longer for bfloat16 than for float32; with a matrix unit, that."""
    timed = SimpleNamespace(afnext_multiplies_bfloat16_faster=lambda: faster)
    monkeypatch.setattr(native, "_library", lambda _: timed)
    monkeypatch.setattr(native, "supported_levels", lambda: ("portable", "avx512vnni", "avx512"))
    assert native.best_level.__wrapped__() == level
    monkeypatch.setattr(native, "supported_levels", lambda: ("portable", "avx512vnni", "avx512", "amx"))
    assert native.best_level.__wrapped__() == "amx"


def test_the_levels_are_those_of_the_architecture_compiled_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the compiler, so that one for ARM makes ARM's libraries on any machine."""
    compiler = tmp_path / "cross-g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = -dumpmachine ] && exec echo aarch64-linux-gnu\n'
        'while [ "$1" != -o ]; do line="$line $1"; shift; done\necho "$line" > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    built = build.build(tmp_path / "made", tmp_path / "objects")
    assert [library.stem for library in built] == [
        f"libafnext_{level}" for level in ("portable", "neon", "neondot", "i8mm")
    ]
    flags = {level: (tmp_path / "objects" / level / "norm.o").read_text() for level in build.levels("arm64")}
    assert "-fopenmp" in flags["portable"]
    assert "-DAFNEXT_NEON" not in flags["portable"]
    assert "-DAFNEXT_NEON" in flags["neon"]
    assert "-march" not in flags["neon"]
    assert "+dotprod " in flags["neondot"]
    assert "+dotprod+i8mm+bf16 " in flags["i8mm"]


def test_macos_links_no_second_openmp() -> None:
    compiled, linked = build.openmp_flags("arm64-apple-darwin23.6.0")
    assert compiled == ["-Xpreprocessor", "-fopenmp"]
    assert linked == ["-undefined", "dynamic_lookup"]


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' table of mapped files")
def test_torch_and_the_kernels_share_one_openmp() -> None:
    """Two would keep two pools of threads, which get in each other's way."""
    with kernels.backend("native"):
        rms_norm(torch.ones(2, 8), torch.ones(8))
    mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    assert len({path for path in mapped if path.name.startswith(("libgomp", "libomp", "libiomp"))}) == 1


def test_a_build_without_a_compiler_is_said_and_not_fatal(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", str(tmp_path / "lib")]
    for name in ("setup.py", "pyproject.toml", "README.md", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "CC": "/bin/false", "CXX": ""}
    earlier = tmp_path / "lib" / "afnext" / "kernels" / "native" / build.library_name("portable")
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"of other sources, which an installed package cannot tell")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=99)
    assert done.returncode == 0, done.stderr
    assert "the native CPU kernels are not built, operations will run on torch" in done.stderr
    assert not list((tmp_path / "lib").rglob("*.so"))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda folder: None, "they were not built"),
        (lambda folder: (folder / build.library_name("portable")).write_bytes(b"no library"), "they cannot be loaded"),
        (lambda folder: _build_with_another_fingerprint(folder), "from other sources"),
    ],
    ids=["absent", "broken", "stale"],
)
def test_libraries_that_do_not_fit_leave_the_cpu_to_torch(
    place: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    place(tmp_path)
    script = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "import torch; from afnext.kernels.norm import rms_norm\n"
        "print(rms_norm(torch.full((1, 8), 3.0), torch.ones(8), 0.0).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,  # not where a folder is called afnext
        env={**os.environ, "AFNEXT_NATIVE": str(tmp_path), "AFNEXT_BACKEND": ""},
        capture_output=True,
        text=True,
        timeout=99,
    )
    assert done.stdout.strip() == str([[1.0] * 8]), done.stderr
    assert done.stderr.count(said) == 1
    assert "rms_norm on cpu runs on torch" in done.stderr


@pytest.mark.parametrize(("device", "forced", "said"), [("cpu", "", 1), ("cpu", "torch", 0), ("meta", "", 0)])
def test_missing_kernels_are_said_once_where_they_would_run(
    device: str, forced: str, said: int, tmp_path: Path
) -> None:
    script = f"""
import afnext
from afnext.kernels.errors import AfnextError
for _ in range(2):
    try:
        afnext.load("tiny", device={device!r})
    except (AfnextError, NotImplementedError, RuntimeError):
        assert {device!r} != "cpu"
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "AFNEXT_NATIVE": str(tmp_path), "AFNEXT_BACKEND": forced},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the native CPU kernels are missing") == said
    assert done.stderr.count("25 times as long") == done.stderr.count("Install a C++ compiler") == said


def _build_with_another_fingerprint(folder: Path) -> None:
    source = folder / "library.cpp"
    source.write_text('extern "C" const char* afnext_fingerprint() { return "another"; }')
    library = folder / build.library_name("portable")
    try:
        subprocess.run(["c++", "-shared", "-fPIC", source, "-o", library], check=True)
    except FileNotFoundError:
        pytest.skip("no C++ compiler on this machine")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", native_backends(norm._rms_norm))
def test_norms_stay_within_their_memory(
    backend: str, dtype: torch.dtype, threads: int, seed: int, restored_threads: None
) -> None:
    x, residual = torch.randn(7, 5003).to(dtype), torch.randn(7, 5003).to(dtype)
    weight, bias = torch.randn(5003).to(dtype), torch.randn(5003).to(dtype)
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = rms_norm(x, weight), *add_layer_norm(x, residual, weight, bias)
    torch.set_num_threads(threads)
    x, residual, weight, bias = map(guarded, (x, residual, weight, bias))
    with poisoned(backend):
        actual = rms_norm(x, weight), *add_layer_norm(x, residual, weight, bias)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", native_backends(activation._gelu, activation._swiglu))
def test_activations_stay_within_their_memory(
    backend: str, dtype: torch.dtype, threads: int, seed: int, restored_threads: None
) -> None:
    x, up = torch.randn(2, 7, 5003).to(dtype)
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = gelu(x), swiglu(x, up)
    torch.set_num_threads(threads)
    x, up = guarded(x), guarded(up)
    with poisoned(backend):
        actual = gelu(x), swiglu(x, up)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", native_backends(activation._gelu, activation._swiglu))
def test_activations_of_more_than_32_megabytes(backend: str, seed: int) -> None:
    """Their output is asked for in large pages."""
    x = torch.randn(9, 1_000_003)
    rows = torch.tensor([0, 4, 8])
    with poisoned(backend):
        torch.testing.assert_close(gelu(x)[rows], gelu(x[rows]))
        torch.testing.assert_close(swiglu(x, x)[rows], swiglu(x[rows], x[rows]))
