"""The compiled CPU kernels: finds their libraries, selects the instruction-set level, and calls them.

`setup.py` compiles the C++ beside this file if there is a compiler (`python setup.py build_ext --inplace` does it by
hand). Otherwise `AVAILABLE` is false, no `native` implementation is registered, and torch computes. The libraries do
not depend on torch or Python, so one build works with every version of both.

The level is the fastest on this CPU, or the one that AFNEXT_ISA names. OpenMP divides loops among
`thread_count()` threads, which on Linux are torch's own: torch loads libgomp.so.1, these libraries link to the
same name, and the loader gives them the copy that is loaded.
"""

import ctypes
import logging
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from . import build
from .recording import current
from .signatures import DTYPES, NUMBER, SIGNATURES, Array
from .threads import thread_count

_log = logging.getLogger("afnext.kernels")
_folder = Path(os.environ.get("AFNEXT_NATIVE", Path(__file__).parent))


def _load() -> tuple[dict[str, ctypes.CDLL], str]:
    """The library of the lowest level, which reports what the other levels need; or none, and the reason."""
    path = _folder / build.library_name("portable")
    if not path.exists():
        return {}, f"they were not built ({path} does not exist)"
    try:
        _share_openmp()
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return {}, f"they cannot be loaded ({error})"
    if build.sources() and _text(library, "afnext_fingerprint") != build.fingerprint():
        return {}, "they were built from other sources than those beside them"
    return {"portable": library}, ""


def _share_openmp() -> None:
    """Make torch's OpenMP visible to the libraries on macOS, where they link to no OpenMP (`build.openmp_flags`)."""
    if sys.platform == "darwin":
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libomp.dylib"), mode=ctypes.RTLD_GLOBAL)


@cache
def warn_if_missing() -> None:
    """Log, once per process, that the native kernels are missing, what that costs, and how to get them."""
    if not AVAILABLE:
        _log.warning(
            "the native CPU kernels are missing, operations run on torch instead: a token with int4 weights takes "
            "about 25 times as long, with int8 1.3 times. Reason: %s. Install a C++ compiler (such as g++), then "
            "install afnext again; in a checkout, run `python setup.py build_ext --inplace`.",
            _missing,
        )


def _text(library: ctypes.CDLL, name: str) -> str:
    function = library[name]
    function.restype = ctypes.c_char_p
    return function().decode()


_libraries, _missing = _load()
AVAILABLE = bool(_libraries)
if _missing:
    _log.info("the native CPU kernels are missing: %s", _missing)


def portable() -> ctypes.CDLL:
    """The library of the lowest level, for what does not depend on the level. It must be AVAILABLE."""
    return _libraries["portable"]


def compiler() -> str:
    """The compiler that built the libraries, which must be AVAILABLE."""
    return _text(_libraries["portable"], "afnext_compiler")


@cache
def supported_levels() -> tuple[str, ...]:
    """The instruction-set levels that this machine can run, lowest first; empty if not AVAILABLE."""
    if not AVAILABLE:
        return ()
    supports = _libraries["portable"].afnext_supports
    return tuple(level for level in build.levels() if supports(level.encode()))


@cache
def best_level() -> str:
    """The highest supported level, except `avx512` if timing shows that bfloat16 products are slower than float32."""
    best = supported_levels()[-1]
    if best == "avx512" and not _library(best).afnext_multiplies_bfloat16_faster():
        _log.info("the CPU multiplies bfloat16 slower than float32: the level is avx512vnni, not avx512")
        return "avx512vnni"
    return best


def isa() -> str:
    """The level in use: AFNEXT_ISA, or the best one. Raises BackendError if this CPU cannot run AFNEXT_ISA."""
    forced = os.environ.get("AFNEXT_ISA")
    if not forced:
        return best_level()
    if forced not in supported_levels():
        raise BackendError(
            f"AFNEXT_ISA={forced} is not an instruction-set level that this machine can run; it has "
            f"{', '.join(supported_levels()) or 'none, because the native kernels are not built'}"
        )
    return forced


def _library(level: str) -> ctypes.CDLL:
    if level not in _libraries:
        _libraries[level] = ctypes.CDLL(str(_folder / build.library_name(level)))
    return _libraries[level]


@cache
def _function(level: str, name: str) -> Any:
    function = _library(level)[f"afnext_{name}"]
    function.restype = None
    function.argtypes = [*map(_type, SIGNATURES[name].parameters.values()), ctypes.c_int64]
    return function


def _type(kind: Array | str) -> Any:
    if isinstance(kind, Array):
        return ctypes.c_void_p
    return ctypes.c_double if kind == NUMBER else ctypes.c_int64


def call(name: str, *arguments: Tensor | torch.dtype | int | float | None) -> None:
    """Run `afnext_<name>` of the level in use, on `thread_count` threads.

    Tensors are passed as pointers to their first element, None as a null pointer, dtypes as numbers, int and bool as
    int64_t, float as double. Raises ValueError unless dtype, shape, strides and device are as `SIGNATURES` declares.
    """
    function = _function(isa(), name)
    threads = thread_count()
    SIGNATURES[name].check(name, arguments, threads)
    # Inlined for speed: a decoded token makes hundreds of calls with a dozen arguments.
    values = [
        argument.data_ptr()
        if isinstance(argument, Tensor)
        else DTYPES[argument]
        if isinstance(argument, torch.dtype)
        else argument
        for argument in arguments
    ]
    values.append(threads)
    function(*values)
    if (recording := current()) is not None:
        recording.add(function, values, arguments)


def check_indices(what: str, indices: Tensor, where: str, count: int) -> None:
    """Raise IndexError, naming both, unless all `indices` are in 0 .. count - 1: C would not notice.

    Does nothing during a recording, whose calls are repeated with other indices: the caller must check these itself.
    """
    if current() is None and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise IndexError(f"{what} from {int(indices.min())} to {int(indices.max())} in {where} of {count}")


def misfit(*tensors: Tensor | None) -> str | None:
    """Why a native kernel for one floating dtype cannot take these tensors (float64, or different dtypes), or None.

    Most implementations' `misfit` calls it (see `dispatch.Operation`).
    """
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) == 1 and dtypes <= DTYPES.keys():
        return None
    return " with ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
