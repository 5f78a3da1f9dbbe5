"""`afnext bench ops --list`: the problems as a table or as JSON, with the least time on this machine."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import torch
from rich.table import Table

from ...kernels.devices import find_device
from ..core.ceilings import Ceilings
from ..report import labels
from .problems import Problem, odd_problems, problems
from .specs import FLOATS, UnknownOperationError, spec, specs


def chosen(operations: Collection[str] = (), pattern: str = "*", dtype: str = "bfloat16") -> list[Problem]:
    """The problems of the model with these operations (all when empty) whose names match `pattern`.

    Raises UnknownOperationError for names, dtypes and patterns that match nothing.
    """
    if dtype not in FLOATS:
        raise UnknownOperationError(f"unknown dtype {dtype!r}; choose {', '.join(FLOATS)}")
    for operation in operations:
        spec(operation)
    found = [problem for problem in problems(dtype=dtype) if not operations or problem.operation in operations]
    matching = [problem for problem in found if fnmatchcase(problem.name, pattern)]
    if not matching:
        raise UnknownOperationError(
            f"no problem is called {pattern!r}; `afnext bench ops --list` names them, such as {found[0].name}"
        )
    return matching


def odd(operations: Collection[str], dtype: str) -> list[Problem]:
    """The odd variants of these operations, all when empty."""
    return [
        problem
        for operation in operations or specs()
        if dtype in spec(operation).dtypes
        for problem in odd_problems(operation, dtype)
    ]


def roofline_of(device: torch.device) -> Ceilings | None:
    """The peaks of a GPU by its data sheet; None for other devices, whose ceilings a benchmark measures."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    known = find_device(properties.name, properties.total_memory)
    return None if known is None else Ceilings(known.bandwidth, known.bandwidth, dict(known.flops))


def table(found: Sequence[Problem], ceilings: Ceilings | None) -> Table:
    """Name, shape, FLOPs, bytes, and the least time where the machine's peaks are known."""
    shown = Table(box=None, pad_edge=False)
    for name in ("problem", "GFLOP", "MB", "FLOP/byte", *(("least time", "limit") if ceilings else ())):
        shown.add_column(name, justify="left" if name in ("problem", "limit") else "right", no_wrap=True)
    for problem in found:
        flops, moved = problem.work.flops, problem.least_bytes
        cells = [problem.name, f"{flops / 1e9:.4g}", f"{moved / 1e6:.4g}", f"{flops / moved:.3g}"]
        if ceilings:
            seconds, limit = ceilings.least_seconds(flops, moved, problem.work.dtype)
            cells += [labels.seconds(seconds), limit]
        shown.add_row(*cells)
    return shown
