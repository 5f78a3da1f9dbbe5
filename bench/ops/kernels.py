"""`afnext bench kernels`: the speed of each operation beside other libraries and the machine's ceilings.

Each case is measured by itself: inputs made, every subject called once and its output compared with the baseline's,
then all timed in turn. Its records are appended at once, afnext's last, so an interrupted run continues with the case
at which it stopped.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...kernels.device_state import synchronize
from ...kernels.dispatch import forced_backend
from ...kernels.errors import AfnextError
from ..core.ceilings import Ceilings, measured_ceilings
from ..core.machine import machine
from ..core.record import Record, append, finished, read
from ..core.timing import (
    Agreement,
    Call,
    Samples,
    TimingError,
    clock_for,
    compare_outputs,
    measure_interleaved,
    speedup,
    threads,
)
from .cases import COMMON, Case, cases
from .problems import QUICK
from .rivals import BASELINE, OURS, Subject, Subjects

BENCH = "kernels"


class KernelBenchmarkError(AfnextError):
    """The requested measurement of kernels is not possible."""


def run_kernels(
    path: Path,
    *,
    device: str = "auto",
    dtypes: Sequence[str] = ("bfloat16",),
    operations: Collection[str] = (),
    quick: bool = False,
    repeats: int = 5,
    min_time: float = 0.2,
    max_time: float = 6.0,
    cold_cache: bool = True,
    graphs: bool = False,
    thread_count: int | None = None,
    only: Sequence[Case] | None = None,
    progress: bool = True,
) -> list[Record]:
    """Measure the operations and append the records to `path`; existing records are not measured again.

    device: auto, cpu, cuda or cuda:N; dtypes: of weights and activations (float32, float16, bfloat16); operations:
    names, all when empty; quick: small shapes that say nothing about the model; repeats, min_time, max_time (seconds
    a case): see `measure_interleaved`; graphs: through CUDA graphs; thread_count: CPU threads, torch's own by default;
    only: cases of your own instead of the model's; progress: a bar on stderr.

    Returns the records of these cases, those found in the file included, in the file's order: first the ceilings, then
    for each case and subject median_s and its like, flops, bytes, tflops_per_s, gb_per_s, percent_of_ceiling, limit,
    relative_error and speedup over torch, None with `no_speedup` where it is refused. Raises KernelBenchmarkError for
    unknown devices, dtypes or operations.
    """
    place = _device(device)
    chosen = _chosen(dtypes, operations, quick) if only is None else list(only)
    settings: dict[str, Any] = {"device": place.type, "cache": "cold" if cold_cache else "warm"}
    settings |= {"threads": thread_count} if thread_count else {}
    clock, done = clock_for(place, graphs=graphs), finished(path)
    measure = partial(
        measure_interleaved,
        repeats=repeats,
        warmup=0,  # the comparison of outputs has called each once
        min_time=min_time,
        max_time=max_time,
        clock=clock,
        cold_cache=cold_cache,
    )
    wanted: set[str] = set()
    with threads(thread_count), _bar(progress) as bar, torch.inference_mode():
        here = machine(place)
        task = bar.add_task("ceilings of this machine", total=len(chosen) + 1)
        ceilings = measured_ceilings(place, quick=quick)
        ceiling = Record(BENCH, "ceiling", "machine", {**settings, "quick": quick}, ceilings.values(), machine=here)
        if ceiling.key not in done:
            append(path, ceiling)
        for case in chosen:
            bar.update(task, advance=1, description=f"{case.operation} {case.label}")
            described = {"label": case.label, **case.shape, "dtype": case.dtype, **settings}
            wanted.add(_case_key(case.operation, described))
            if Record(BENCH, case.operation, _subject(OURS, case), described, {}).key in done:
                continue
            try:
                measured = measure_case(case, place, measure, ceilings, bar.console)
            except (TimingError, torch.OutOfMemoryError) as error:
                bar.console.print(f"[yellow]{case.operation} {case.label} is left out[/]: {escape(str(error))}")
                continue
            for name, values in measured.items():
                values["clock"] = clock.name
                append(path, Record(BENCH, case.operation, _subject(name, case), described, values, machine=here))
        bar.update(task, advance=1)
    wanted.add(_case_key(ceiling.name, ceiling.case))
    return [record for record in read(path) if record.bench == BENCH and _case_key(record.name, record.case) in wanted]


def measure_case(
    case: Case,
    device: torch.device,
    measure: Callable[[Mapping[str, Call]], dict[str, Samples]],
    ceilings: Ceilings,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Compare the subjects of one case and time them by `measure`; return the values of their records, ours last.

    Another library that fails is skipped with a message on `console`; a failure of afnext is raised.
    """
    subjects = case.subjects(device)
    agreements = _compare(case, subjects, device, console)
    samples = measure({name: subjects[name].call for name in agreements})
    ordered = sorted(samples, key=lambda name: name == OURS)
    return {name: _values(case, name, samples, agreements[name], ceilings) for name in ordered}


def _compare(case: Case, subjects: Subjects, device: torch.device, console: Console) -> dict[str, Agreement]:
    """Call each subject once; return whether its output agrees with the baseline's."""
    outputs: dict[str, Any] = {}
    for name, subject in subjects.items():
        try:
            outputs[name] = _output(subject, device)
        except Exception as error:  # of whatever library
            if name == OURS:
                raise
            console.print(f"[yellow]{name} is left out of {case.operation} {case.label}[/]: {escape(str(error))}")
    if BASELINE not in outputs:
        return {name: Agreement(False, float("nan"), f"{BASELINE} was not measured") for name in outputs}
    expected = outputs[BASELINE]
    return {name: compare_outputs(expected, actual, case.tolerance) for name, actual in outputs.items()}


def _output(subject: Subject, device: torch.device) -> Any:
    returned = subject.output(subject.call())
    synchronize(device)
    return returned


def _values(
    case: Case, name: str, samples: dict[str, Samples], agreement: Agreement, ceilings: Ceilings
) -> dict[str, Any]:
    taken = samples[name]
    values: dict[str, Any] = {
        **taken.values(),
        "flops": case.flops,
        "bytes": case.bytes,
        "tflops_per_s": case.flops / taken.median / 1e12,
        "gb_per_s": case.bytes / taken.median / 1e9,
        "percent_of_ceiling": ceilings.percent(taken.median, case.flops, case.bytes, case.kind or case.dtype),
        "limit": ceilings.least_seconds(case.flops, case.bytes, case.kind or case.dtype)[1],
    }
    if name == BASELINE:
        return values
    faster = speedup(samples.get(BASELINE, taken), taken, agreement)
    values |= {"speedup": faster.ratio, "speedup_low": faster.low, "speedup_high": faster.high}
    values |= {"speedup_over": f"{BASELINE} {case.dtype}"}
    if agreement.error < float("inf"):  # JSON has neither infinity nor NaN
        values["relative_error"] = agreement.error
    return values if faster.ratio is not None else {**values, "no_speedup": faster.reason}


def _chosen(dtypes: Sequence[str], operations: Collection[str], quick: bool) -> list[Case]:
    for dtype in dtypes:
        if dtype not in ("float32", "float16", "bfloat16"):
            raise KernelBenchmarkError(f"unknown dtype {dtype!r}; choose float32, float16 or bfloat16")
    sizes = QUICK if quick else COMMON
    every = {(c.operation, c.label, c.dtype): c for dtype in dtypes for c in cases(sizes, getattr(torch, dtype))}
    known = {case.operation for case in every.values()}
    unknown = sorted(set(operations) - known)
    if unknown:
        raise KernelBenchmarkError(f"unknown operations {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [case for case in every.values() if not operations or case.operation in operations]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise KernelBenchmarkError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise KernelBenchmarkError("there is no CUDA device here; choose --device cpu")
    return device


def _subject(name: str, case: Case) -> str:
    forced = forced_backend()
    return f"{name} {case.dtype}" + (f" ({forced} backend)" if forced and name == OURS else "")


def _case_key(name: str, case: dict[str, Any]) -> str:
    return repr((name, sorted(case.items())))


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)
