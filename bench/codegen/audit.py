"""`afnext bench codegen`: compiles the kernels of the full-size model for every chip, without a GPU.

The runtime's host code runs on meta tensors (`trace.py`, `stages.py`) once for each target, so that it uses that chip
family's configs. Its launches are compiled ahead of time and the binaries inspected (`compiled.py`); counted bytes and
FLOPs give the least time on each GPU (`core/work.py`, `kernels/devices.py`). That time is projected, not measured: it
excludes latencies, caches and launches.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.configs import targeting
from ...kernels.dispatch import forced_backend
from ...kernels.errors import AfnextError
from .chips import GPUS, Gpu
from .compiled import TARGETS, Resources, compile_all, violations
from .stages import Stage, full_size_model, stages
from .trace import Launch, Recording, recorded_launches

Progress = Callable[[int, int], None]


class CodegenError(AfnextError):
    """The requested audit is not possible."""


@dataclass
class Row:
    """One launch of the model. stages: its count in each stage; launches, resources: by target, because configs, and so
    kernels, differ by chip."""

    operation: str
    kernel: str
    arguments: tuple[str, ...]
    stages: dict[str, int] = field(default_factory=dict)
    launches: dict[str, Launch] = field(default_factory=dict)
    resources: dict[str, Resources] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the operation, or without one the kernel's file, and of the kernel: decode_attention._merge_kernel."""
        file, _, function = self.kernel.rpartition(".")
        return f"{self.operation or file}.{function}"

    def flops(self, target: str) -> float:
        """FLOPs in matrix products: those of the whole operation, assigned to its kernel with a dot."""
        return self.launches[target].work.products if self.resources[target].has_dot else 0.0

    def projected(self, gpu: Gpu) -> tuple[float, str] | None:
        """The least seconds of one launch and their limit, "memory" or "compute"; None if not compiled."""
        target = f"sm_{gpu.sm}"
        if target not in self.resources or self.resources[target].error:
            return None
        launch = self.launches[target]
        return gpu.least_seconds(self.flops(target), launch.bytes, launch.work.dtype)


@dataclass
class Audit:
    """rows: in the order of the first launch; targets: compiled for; torch_operations: those without a Triton kernel of
    afnext; untraced: stages whose tracing failed, and why."""

    targets: tuple[str, ...]
    rows: list[Row]
    torch_operations: list[str]
    untraced: dict[str, str]

    @property
    def offenders(self) -> list[str]:
        """The violations, one sentence each; empty if there are none."""
        found = [f"{stage} cannot be traced: {reason}" for stage, reason in self.untraced.items()]
        where: dict[str, list[str]] = {}
        for row in self.rows:
            for target, resources in row.resources.items():
                for violation in violations(resources, target):
                    fault = f"{row.name} on {target} {violation}; {_options(row.launches[target])}"
                    where.setdefault(fault, []).extend(row.stages)
        return found + [f"{fault}; in {', '.join(dict.fromkeys(stages))}" for fault, stages in where.items()]


def audit(
    *,
    targets: Collection[str] = (),
    operations: Collection[str] = (),
    only: Iterable[Stage] | None = None,
    workers: int = 2,
    progress: Progress = lambda done, total: None,
) -> Audit:
    """Trace the full-size model and compile what it launches.

    targets: some of `TARGETS`, operations: names, all when empty; only: custom stages instead of the model's; workers:
    see `compile_all`; progress: called with (done, total), first for tracing, then for compiling.
    Raises CodegenError for unknown targets and operations.
    """
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise CodegenError(f"unknown targets {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    chosen = tuple(target for target in TARGETS if not targets or target in targets)
    if (forced := forced_backend()) not in (None, "triton"):
        raise CodegenError(
            f"the backend {forced} is forced, so nothing of Triton's would be seen; unset AFNEXT_BACKEND"
        )
    wanted = list(stages(full_size_model()) if only is None else only)
    rows: dict[Any, list[Row]] = {}
    torch_operations: set[str] = set()
    untraced: dict[str, str] = {}
    for done, (target, stage, recording, failure) in enumerate(_traced(chosen, wanted), start=1):
        progress(done, len(chosen) * len(wanted))
        torch_operations |= recording.torch_operations
        if failure:
            untraced[stage.name] = failure
        _enter(rows, target, stage, recording.launches)
    every = [row for alike in rows.values() for row in alike]
    known = {row.operation or row.kernel for row in every}
    if unknown := sorted(set(operations) - known):
        raise CodegenError(f"unknown operations {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    kept = [row for row in every if not operations or (row.operation or row.kernel) in operations]
    jobs = [(launch.specialization, target) for row in kept for target, launch in row.launches.items()]
    compiled = compile_all(jobs, workers=workers, progress=progress)
    for row in kept:
        row.resources = {
            target: compiled[launch.specialization.digest, target] for target, launch in row.launches.items()
        }
    return Audit(chosen, kept, sorted(torch_operations), untraced)


def to_dict(result: Audit) -> dict[str, Any]:
    """The audit as JSON: everything that the tables say, and the config of every launch."""
    return {
        "kind": "projected",
        "targets": list(result.targets),
        "offenders": result.offenders,
        "torch_operations": result.torch_operations,
        "gpus": [
            {
                "name": gpu.name,
                "sm": gpu.sm,
                "bytes_per_s": gpu.device.bandwidth,
                "peaks": gpu.peaks,
                "source": gpu.device.source,
            }
            for gpu in GPUS
        ],
        "rows": [_row_dict(row) for row in result.rows],
    }


def _traced(targets: tuple[str, ...], wanted: list[Stage]) -> Iterator[tuple[str, Stage, Recording, str]]:
    for target in targets:
        for stage in wanted:
            failure = ""
            with targeting(target.replace("_", "")), recorded_launches(stage.context) as recording:
                try:
                    with torch.inference_mode():
                        stage.run()
                except Exception as error:  # host code may raise anything; the other stages continue
                    failure = " ".join(f"{type(error).__name__}: {error}".split())
            yield target, stage, recording, failure


def _enter(rows: dict[Any, list[Row]], target: str, stage: Stage, launches: list[Launch]) -> None:
    """Add launches to the rows: the same kernel with the same work and similar arguments is one row."""
    counts: Counter[int] = Counter()
    for launch in launches:
        touched = tuple(launch.work.touched.items())
        key = (launch.operation, launch.kernel, launch.arguments, launch.index, launch.work.products, touched)
        row = _row_of(rows.setdefault(key, []), target, launch)
        counts[id(row)] += 1
        row.stages[stage.name] = counts[id(row)]


def _row_of(alike: list[Row], target: str, launch: Launch) -> Row:
    """The row of a launch among similar ones, which differ in specialization, such as the alignment of a view."""
    for row in alike:
        if row.launches.setdefault(target, launch).specialization.digest == launch.specialization.digest:
            return row
    alike.append(Row(launch.operation, launch.kernel, launch.arguments, launches={target: launch}))
    return alike[-1]


def _options(launch: Launch) -> str:
    config = {**launch.specialization.constants, **launch.specialization.options}
    return ", ".join(f"{name}={value}" for name, value in config.items())


def _row_dict(row: Row) -> dict[str, Any]:
    return {
        "operation": row.operation,
        "kernel": row.kernel,
        "arguments": list(row.arguments),
        "stages": row.stages,
        "targets": {target: _target_dict(row, target) for target in row.launches},
        "projected_seconds": {
            gpu.name: {"least": least[0], "limit": least[1]} for gpu in GPUS if (least := row.projected(gpu))
        },
    }


def _target_dict(row: Row, target: str) -> dict[str, Any]:
    launch, resources = row.launches[target], row.resources[target]
    return {
        "grid": list(launch.grid),
        "constants": launch.specialization.constants,
        "options": launch.specialization.options,
        "bytes": launch.bytes,
        "flops": row.flops(target),
        "dtype": launch.work.dtype,
        **resources.as_dict(target),
    }
