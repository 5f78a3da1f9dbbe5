"""The implementation that each operation uses on this machine, why, and how it was built."""

import importlib
import pkgutil
from typing import Any

import torch
from rich.table import Table

from ... import kernels
from ...kernels import autotune, contention, fastest, native, spread
from ...kernels.attention_libraries import versions
from ...kernels.cpus import use_default_threads
from ...kernels.dispatch import operations
from ...kernels.errors import BackendError


def describe_backends(device: torch.device) -> dict[str, Any]:
    """The backends tried for each operation on `device`, best first, those chosen by timing, and how the CPU's kernels
    were built, as plain values.

    Raises BackendError if AFNEXT_BACKEND or AFNEXT_ISA names something that is not available.
    """
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        importlib.import_module(module.name)
    return {
        "device": str(device),
        **_threads(),
        "native": {"isa": native.isa(), "levels": native.supported_levels(), "compiler": native.compiler()}
        if native.AVAILABLE
        else None,
        "operations": {operation.name: _tried(operation, device) for operation in operations()},
        "timed": _timed(device) if autotune.has_chip(device) else None,
    }


def _timed(device: torch.device) -> dict[str, Any]:
    """The backends that were chosen by timing on this machine. ignored: where others in the file were timed."""
    ours, others = fastest.choices(device, versions(device))
    names = ("operation", "shapes", "backend", "milliseconds")
    return {
        "used": autotune.wanted(),
        "file": str(autotune.path()),
        "choices": [{name: getattr(choice, name) for name in names} for choice in ours],
        "ignored": sorted({choice.machine for choice in others}),
    }


def _threads() -> dict[str, Any]:
    """The number of CPU threads that `load` would use, what it follows from, whether decode steps spread them, and
    whether these use fewer while other processes use the cores."""
    reason = use_default_threads()
    threads = torch.get_num_threads()
    against_spread, against_fewer = spread.reason_against(threads), contention.reason_against(threads)
    return {
        "threads": threads,
        "threads_reason": reason,
        "spread": against_spread is None,
        "spread_reason_against": against_spread,
        "fewer": against_fewer is None,
        "fewer_reason_against": against_fewer,
    }


def _tried(operation: Any, device: torch.device) -> list[str]:
    try:
        return [name for name in operation.candidates(device) if name != "reference"] or ["reference"]
    except BackendError:
        return []


def table(description: dict[str, Any]) -> Table:
    """`describe_backends`' result as a table."""
    rows = Table(show_header=False, box=None, pad_edge=False)
    rows.add_column(style="bold")
    rows.add_column()
    rows.add_row("device", description["device"])
    rows.add_row("CPU threads", f"{description['threads']} ({description['threads_reason']})")
    for label, key, when in (
        ("spread over cores", "spread", "at the start of each decode step"),
        ("fewer if cores are busy", "fewer", "in decode steps, while that is faster"),
    ):
        rows.add_row(f"  {label}", when if description[key] else f"no: {description[f'{key}_reason_against']}")
    built = description["native"]
    rows.add_row(
        "native kernels",
        f"{built['isa']} of {', '.join(built['levels'])}; {built['compiler']}"
        if built
        else "not built: install with a C++ compiler to have them",
    )
    for name, tried in description["operations"].items():
        first, *others = tried or ["nothing: the forced backend lacks it"]
        rows.add_row(f"  {name}", first + (f" (else {', '.join(others)})" if others else ""))
    if (timed := description["timed"]) is not None:
        _add_timed(rows, timed)
    return rows


def _add_timed(rows: Table, timed: dict[str, Any]) -> None:
    state = "used" if timed["used"] else "not used: set AFNEXT_AUTOTUNE=1 to time backends and use the fastest"
    rows.add_row("chosen by timing", state)
    for choice in timed["choices"]:
        times = sorted(choice["milliseconds"].items(), key=lambda item: item[1])
        shown = ", ".join(f"{name} {time:.3g} ms" for name, time in times)
        rows.add_row(f"  {choice['operation']}", f"{choice['backend']} for {choice['shapes']}: {shown}")
    for machine in timed["ignored"]:
        rows.add_row("  ignored", f"choices timed with {machine}")
