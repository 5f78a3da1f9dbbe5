"""Spreads OpenMP threads over the cores at the start of a decode step.

The threads of a step wait for each other hundreds of times. If the system leaves two of them on one core, a wait lasts
until its next tick, 4 ms, even while another core is idle or another process could share it. So each step starts with
one thread on each core. From then on the system may move them: threads bound for good take twice as long as others if
another process uses their core, and threads that they start would inherit it.
"""

import ctypes
import logging
import os
import sys
from functools import cache, lru_cache
from typing import Any

from .cpus import Cpus, usable_cpus
from .native import AVAILABLE, portable

_log = logging.getLogger("afnext.kernels")

PLACEMENT_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Environment variables that control how OpenMP places threads."""


def spread(threads: int) -> None:
    """Move the caller's `threads` OpenMP threads to a core each, unless `reason_against` names a reason.

    Takes about 10 us. Logs a warning, once, if the system refuses.
    """
    if threads == 1 or reason_against(threads) is not None:
        return
    if _function()(*_sets(threads, _allowed()), threads):
        _log_refusal()


def reason_against(threads: int, cpus: Cpus | None = None) -> str | None:
    """Why `spread(threads)` does nothing, or None if it does something. cpus: in place of those of the caller."""
    if sys.platform != "linux":
        return "only possible on Linux"
    if not AVAILABLE:
        return "the native kernels are not built"
    asked = next((name for name in PLACEMENT_VARIABLES if os.environ.get(name)), None)
    if asked is not None:
        return f"{asked} is set"
    if threads == 1:
        return "there is one thread"
    cpus = cpus or _cpus(_allowed())
    if threads not in (len(cpus.cores), len(cpus.allowed)):
        return f"not as many threads as cores ({len(cpus.cores)}) or CPUs ({len(cpus.allowed)})"
    return None


@cache
def _log_refusal() -> None:
    _log.warning("the system does not let this process move its threads to other cores (sched_setaffinity)")


@cache
def _function() -> Any:
    function = portable().afnext_spread_threads
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
    return function


def _allowed() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


@lru_cache(maxsize=8)
def _cpus(allowed: frozenset[int]) -> Cpus:
    return usable_cpus(allowed=allowed)


@lru_cache(maxsize=8)
def _sets(threads: int, allowed: frozenset[int]) -> tuple[bytes, bytes, int]:
    """A set of CPUs for each thread, the set of all, and the bytes of a set, as `afnext_spread_threads` takes them."""
    cores = _cpus(allowed).cores
    if threads != len(cores):
        cores = tuple(frozenset({cpu}) for cpu in sorted(allowed))
    size = (max(allowed) // 64 + 1) * 8
    return b"".join(_bits(core, size) for core in cores), _bits(allowed, size), size


def _bits(cpus: frozenset[int], size: int) -> bytes:
    return sum(1 << cpu for cpu in cpus).to_bytes(size, "little")
