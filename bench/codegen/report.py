"""The audit of the kernels as tables: for the terminal, and as the page that is committed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from ...kernels.chips import KIB
from ..report import labels
from .audit import Audit, Row, to_dict
from .chips import GPUS
from .compiled import Resources

RESOURCES = (
    "Each cell: registers a thread, shared memory a block, occupancy (resident warps of those possible), tensor-core "
    "instructions in the machine code, and spills if there are any. A dash: this chip is not given this kernel. A line "
    "has all launches of the same machine code."
)
PROJECTED = (
    "The least time of one launch, computed and not measured: the larger of bytes over memory bandwidth and FLOPs "
    "over the tensor cores' dense peak (marked c where that is the larger). Bytes: every tensor argument once, of "
    "pages and tables only the part that the launch touches. FLOPs: multiplies and adds of matrix products; "
    "elementwise arithmetic is not counted, nor are latencies and launches, and what a cache saves is not deducted."
)
TOTALS = (
    "All launches of a stage added up, so without the dense products that torch hands to cuBLAS and cuDNN; projected "
    "like the table above."
)
COMMAND = "afnext bench codegen --out bench/results"

_BREAK = "\n"  # within a cell
Rows = list[tuple[str, ...]]


def write_audit(result: Audit, out: Path) -> tuple[Path, Path]:
    """Write `codegen.md` and `codegen.json` into the folder `out`; return both paths."""
    out.mkdir(parents=True, exist_ok=True)
    page, data = out / "codegen.md", out / "codegen.json"
    page.write_text(_markdown(result), encoding="utf-8")
    data.write_text(_lines(to_dict(result)), encoding="utf-8")
    return page, data


def _lines(values: dict[str, Any]) -> str:
    """JSON with each entry of a list on a line of its own, so that a change of one is a change of a line."""
    parts = []
    for name, value in values.items():
        entries = ",\n".join(map(json.dumps, value)) if isinstance(value, list) else ""
        parts.append(f"{json.dumps(name)}: " + (f"[\n{entries}\n]" if entries else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def show_audit(result: Audit, console: Console) -> None:
    """Print the tables."""
    for title, note, (columns, rows) in _tables(result):
        table = Table(title=title, caption=note, title_justify="left", caption_justify="left", box=None, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < 2 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table, "")


def _markdown(result: Audit) -> str:
    parts = [
        "# The kernels of the full-size model, compiled ahead of time",
        f"Made by `{COMMAND}` with triton {triton.__version__} and torch {torch.__version__.partition('+')[0]}, on a "
        "machine that needs no GPU. The runtime's own host code runs without data, and every launch that it makes is "
        "compiled for each chip with that chip's default config. The configs, and all figures, are in `codegen.json`.",
        _verdict(result),
    ]
    if result.torch_operations:
        parts.append(f"Left to torch, without a kernel of ours: {', '.join(result.torch_operations)}.")
    for title, note, (columns, rows) in _tables(result):
        parts += [f"## {title}", note, _markdown_table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def _verdict(result: Audit) -> str:
    if result.offenders:
        return "**The audit fails:**\n\n" + "\n".join(f"- {offender}" for offender in result.offenders)
    return (
        "The audit passes: no kernel spills registers, takes more shared memory than its chip has, or multiplies "
        "matrices without tensor cores."
    )


def _markdown_table(columns: tuple[str, ...], rows: Rows) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace(_BREAK, ", ")


def _tables(result: Audit) -> Iterator[tuple[str, str, tuple[tuple[str, ...], Rows]]]:
    numbered = [(f"{number}", row) for number, row in enumerate(result.rows, start=1)]
    launches: Rows = [(number, row.name, _stages(row), ", ".join(row.arguments)) for number, row in numbered]
    yield (
        "Launches",
        "How often each stage of a request launches each kernel, and the tensors of the operation that does.",
        (("#", "kernel", "launches", "tensors"), launches),
    )
    yield "Resources", RESOURCES, (("#", "kernel", *result.targets), list(_resources(result, numbered)))
    gpus = tuple(gpu.name for gpu in GPUS)
    projected = [(number, row.name, *_work_cells(row), *_projected_cells(row)) for number, row in numbered]
    yield "Projected time of one launch", PROJECTED, (("#", "kernel", "MB", "GFLOP", *gpus), projected)
    totals = list(_totals(result))
    yield "Projected time of all launches of a stage", TOTALS, (("stage", "launches", *gpus), totals)


def _resources(result: Audit, numbered: list[tuple[str, Row]]) -> Iterator[tuple[str, ...]]:
    """One line for launches of the same machine code on every chip."""
    alike: dict[object, list[tuple[str, Row]]] = {}
    for number, row in numbered:
        code = tuple((target, launch.specialization.digest) for target, launch in row.launches.items())
        alike.setdefault((row.kernel, code), []).append((number, row))
    for same in alike.values():
        names = dict.fromkeys(row.name for _, row in same)
        cells = (_resources_cell(same[0][1].resources.get(target), target) for target in result.targets)
        yield (", ".join(number for number, _ in same), ", ".join(names), *cells)


def _stages(row: Row) -> str:
    return "; ".join(f"{stage}: {count}" for stage, count in row.stages.items())


def _resources_cell(resources: Resources | None, target: str) -> str:
    if resources is None:
        return "–"
    if resources.error:
        return "does not compile"
    shared = f"{resources.shared / KIB:.3g} K" if resources.shared >= KIB else f"{resources.shared} B"
    parts = [f"{resources.registers} r, {shared}, {resources.occupancy(target):.0%}"]
    parts += [f"{count} {name}" for name, count in (resources.instructions or {}).items()]
    parts += [f"spills {resources.spills} B"] if resources.spills else []
    return _BREAK.join(parts)


def _work_cells(row: Row) -> tuple[str, str]:
    """Bytes and FLOPs on the first chip: where they differ from chip to chip, it is by the parts of split work."""
    target = next(iter(row.launches))
    flops = row.flops(target)
    return f"{row.launches[target].bytes / 1e6:.3g}", f"{flops / 1e9:.3g}" if flops else ""


def _projected_cells(row: Row) -> Iterator[str]:
    for gpu in GPUS:
        least = row.projected(gpu)
        yield "–" if least is None else labels.seconds(least[0]) + (" c" if least[1] == "compute" else "")


def _totals(result: Audit) -> Iterator[tuple[str, ...]]:
    names = dict.fromkeys(stage for row in result.rows for stage in row.stages)
    for stage in names:
        rows = [(row, row.stages[stage]) for row in result.rows if stage in row.stages]
        sums: list[Any] = []
        for gpu in GPUS:
            times = [(least[0], count) for row, count in rows if (least := row.projected(gpu)) is not None]
            sums.append(labels.seconds(sum(time * count for time, count in times)) if times else "–")
        yield (stage, f"{sum(count for _, count in rows)}", *sums)
