"""The worked example of docs/contributing-a-kernel.md: its files are put together and its tests collected from here."""

import ctypes
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from afnext import kernels
from afnext.kernels import dispatch
from afnext.kernels.native import build

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "contributing-a-kernel.md"
BLOCK = re.compile(r"^```(?:python|cpp)\n(?:#|//) (?P<file>\S+)\n(?P<source>.*?)^```", re.MULTILINE | re.DOTALL)

_folder = tempfile.TemporaryDirectory(prefix="afnext-docs-")  # Triton reads a kernel's source when it is launched


def written() -> dict[str, Path]:
    """The files of the page, each with all of its blocks in order, by their paths in the repository."""
    sources: dict[str, str] = {}
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        sources[block["file"]] = sources.get(block["file"], "") + block["source"] + "\n\n"
    paths = {file: Path(_folder.name) / Path(file).name for file in sources}
    for file, path in paths.items():
        path.write_text(sources[file], encoding="utf-8")
    return paths


def imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


FILES = written()
assert set(FILES) == {"kernels/l2_norm.py", "tests/kernels/test_l2_norm.py", "kernels/native/l2_norm.cpp"}
_example = imported("afnext.kernels.l2_norm", FILES["kernels/l2_norm.py"])
kernels.l2_norm = _example  # type: ignore[attr-defined]
try:
    _tests = imported("docs_test_l2_norm", FILES["tests/kernels/test_l2_norm.py"])
finally:  # the rest of the suite sees only the project's own modules
    del kernels.l2_norm, sys.modules["afnext.kernels.l2_norm"]  # type: ignore[attr-defined]
    dispatch._operations.discard(_example._operation)

globals().update({f"{name}_of_the_page": test for name, test in vars(_tests).items() if name.startswith("test_")})


def test_the_page_has_tests() -> None:
    assert {"test_accuracy_of_the_page", "test_strided_rows_of_the_page"} <= set(globals())


def test_the_native_kernel_compiles_and_computes(seed: int, tmp_path: Path) -> None:
    try:
        compiler = build._compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    library = tmp_path / "l2_norm.so"
    flags = [*build._FLAGS, "-O1", "-I", str(build.HERE), "-shared"]
    subprocess.run([*compiler, *flags, str(FILES["kernels/native/l2_norm.cpp"]), "-o", str(library)], check=True)
    x = torch.randn(5, 2 * 37)[:, 37:]
    out = torch.full((5, 37), torch.nan)
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
    sizes = (ctypes.c_int64(value) for value in (*x.shape, x.stride(0)))
    function = ctypes.CDLL(str(library)).afnext_l2_norm
    function(*pointers, *sizes, ctypes.c_double(1e-5), ctypes.c_int64(0), ctypes.c_int64(2))
    torch.testing.assert_close(out, _example.reference(x, 1e-5), rtol=1e-6, atol=1e-7)
