"""`afnext batch`: the same question, task or transcript for many recordings, or a file of OpenAI requests."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import AudioError
from ...files import read_bytes
from .options import (
    DENSE,
    Attention,
    FromOption,
    LoadOptions,
    OutputOptions,
    RayOptions,
    SamplingOptions,
    SystemOption,
    TaskOption,
    ToOption,
    TruncateOption,
    grouped,
    question_text,
)
from .output import announce, fail, log_to_stderr, note, progress, stderr_console, write_json
from .sources import STDIN
from .targets import recordings

if TYPE_CHECKING:
    from ..batch import Item, Question, RunnerContext, Summary, Transcription, Work
    from ..batch_rows import Row, Rows

_LIST, _REQUESTS = "@", ".jsonl"
_MAX_LIST = 1 << 28


@grouped
def batch(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Output, a .jsonl file or a .parquet folder; rows are appended."),
    ],
    loading: LoadOptions,
    sampling: SamplingOptions,
    fleet: RayOptions,
    show: OutputOptions,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IN...",
            help="Recordings, folders, globs, @FILE with a path per line, or .jsonl files of OpenAI requests.",
        ),
    ] = None,
    ask: Annotated[str | None, typer.Option(help="A question about each recording.", callback=question_text)] = None,
    transcribe: Annotated[bool, typer.Option("--transcribe", help="Transcribe each recording.")] = False,
    task: TaskOption = None,
    to: ToOption = None,
    source: FromOption = None,
    lists: Annotated[
        list[Path] | None, typer.Option("--list", help="A text file with a path per line; repeat for more.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Process failed recordings again.")] = False,
    jobs: Annotated[int, typer.Option(help="Recordings that a model processes at once.", min=1, max=1024)] = 8,
    window: Annotated[float | None, typer.Option(help="With --transcribe: seconds per window.", min=1.0)] = None,
    overlap: Annotated[
        float | None, typer.Option(help="With --transcribe: overlap of windows in seconds.", min=0.0)
    ] = None,
    timestamps: Annotated[bool | None, typer.Option(help="With --transcribe: ask for times.")] = None,
    speakers: Annotated[bool | None, typer.Option(help="With --transcribe: ask for speakers.")] = None,
    prompt: Annotated[str | None, typer.Option(help="With --transcribe: replaces the prompt.")] = None,
    system: SystemOption = None,
    truncate: TruncateOption = False,
) -> None:
    """Process many recordings, and continue where the last run ended.

    Each recording becomes a row. Recordings that have a row are skipped; a changed file, model or option gives a new
    row. A failed recording becomes a row, too, and the exit code is 1.
    """
    log_to_stderr(show.verbose)
    fleet.check()
    names, requests = _inputs(inputs or [], lists or [])
    transcripts: dict[str, Any] = {
        name: value
        for name, value in {
            "window": window,
            "overlap": overlap,
            "timestamps": timestamps,
            "speakers": speakers,
            "prompt": prompt,
        }.items()
        if value is not None
    }
    _check_usage(names, requests, ask, transcribe, task, transcripts)
    from ..batch import Question, Transcription, model_identity, pending, run_batch
    from ..batch_rows import open_rows

    options: Any = {**sampling.given(), "truncate": truncate}
    work = (
        Transcription(**transcripts, system=system, options=options)
        if transcribe
        else Question(ask, task, to, source, system=system, options=options)
    )
    identity = model_identity(
        loading.model,
        revision=loading.revision,
        dtype=loading.dtype,
        quant=None if loading.quant == DENSE else loading.quant,
        kv=loading.kv.value,
        batch_invariant=loading.batch_invariant,
        **({} if loading.attention == Attention.auto else {"attention": loading.attention.value}),
    )
    items = _planned(names, requests, work, identity)
    with open_rows(out) as rows:
        left = pending(items, rows, retry=retry)
        summary = _before(items, left, rows)
        if left:
            announce(loading.model, show.silent)
            works = list({id(item.work): item.work for item in left}.values())
            running = _on_ray(loading, fleet, works, jobs) if fleet.ray else _here(loading, works, jobs, show.silent)
            with running as runner, _counted(len(left), show.silent) as advance:

                def on_row(item: "Item", row: "Row") -> None:
                    advance()
                    if row["status"] != "ok" and not show.as_json:
                        _report(item, row)

                ran = run_batch(runner, left, rows, on_row)
            summary.done, summary.failed, summary.seconds = ran.done, ran.failed, ran.seconds
            summary.audio_seconds = ran.audio_seconds
    _print_summary(summary, out, show)
    if summary.failed or summary.failed_before:
        raise typer.Exit(1)


@contextmanager
def _here(loading: LoadOptions, works: "Sequence[Work]", jobs: int, hidden: bool) -> "Iterator[RunnerContext]":
    """The runner of a model in this process."""
    from ..batch import local_runner

    with progress(hidden) as bars:
        model = loading.load(bars)
    with model:
        for work in works:
            work.check(model)
        yield local_runner(model, jobs)


@contextmanager
def _on_ray(loading: LoadOptions, fleet: RayOptions, works: "Sequence[Work]", jobs: int) -> "Iterator[RunnerContext]":
    """The runner of replicas on Ray."""
    from ..batch_ray import ray_runner
    from ..ray_cluster import connected, gpus_of_a_replica

    cpus = loading.threads or 1
    with connected(fleet.ray_address, fleet.replicas * cpus, logs=False):
        gpus = gpus_of_a_replica(fleet.gpus_per_replica, loading.device, max(loading.tp, loading.sp))
        yield ray_runner(loading.load, works, replicas=fleet.replicas, gpus=gpus, cpus=cpus, jobs=jobs)


def _inputs(given: list[str], lists: list[Path]) -> tuple[list[str], list[Path]]:
    """The recordings and folders, and the files of requests, named directly, by a glob or in a list."""
    names = [name for each in given for name in _expanded(each)]
    names += [name for each in lists for name in _listed(each)]
    if STDIN in names:
        raise typer.BadParameter("standard input cannot be a recording of a batch; name files.", param_hint="IN")
    requests = [name for name in names if Path(name).suffix == _REQUESTS and not os.path.isdir(name)]
    found = recordings([name for name in names if name not in requests])
    return [recording.source for recording in found], [Path(name) for name in dict.fromkeys(requests)]


def _expanded(name: str) -> Iterable[str]:
    if os.path.exists(name):
        return [name]
    if name.startswith(_LIST):
        return _listed(Path(name[len(_LIST) :]))
    if not glob.has_magic(name):
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        raise AudioError(f"no file matches {name}; check the pattern.")
    return found


def _listed(path: Path) -> list[str]:
    lines = read_bytes(path, str(path), AudioError, _MAX_LIST).splitlines()
    return [os.fsdecode(line) for line in lines if line.strip()]


def _check_usage(
    names: list[str],
    requests: list[Path],
    ask: str | None,
    transcribe: bool,
    task: str | None,
    transcripts: dict[str, Any],
) -> None:
    kinds = [ask is not None, transcribe, task is not None].count(True)
    if not names and not requests:
        raise typer.BadParameter("name recordings, folders, or a file of requests.", param_hint="IN")
    if names and kinds != 1:
        raise typer.BadParameter("give one of --ask, --transcribe and --task.", param_hint="--ask")
    if not names and kinds:
        raise typer.BadParameter(
            "requests have their own questions; leave out --ask, --transcribe and --task.", param_hint="--ask"
        )
    if transcripts and not transcribe:
        option = "--" + next(iter(transcripts))
        raise typer.BadParameter("it belongs to --transcribe.", param_hint=option)


def _planned(
    names: list[str], requests: list[Path], work: "Question | Transcription", identity: dict[str, Any]
) -> "list[Item]":
    from ..batch import plan_files, unique
    from ..batch_requests import plan_requests

    return unique(
        plan_files(names, work, identity) + [item for path in requests for item in plan_requests(path, identity)]
    )


def _before(items: "list[Item]", left: "list[Item]", rows: "Rows") -> "Summary":
    """The summary before the run begins."""
    from ..batch import Summary
    from ..batch_rows import FAILED

    failed = sum(rows.statuses.get(item.id) == FAILED for item in items)
    return Summary(len(items), skipped=len(items) - len(left) - failed, failed_before=failed)


@contextmanager
def _counted(total: int, hidden: bool) -> "Iterator[Any]":
    """A progress bar on stderr if it is a terminal, with the remaining time; yields a function that counts an item."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = stderr_console()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=hidden or not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
        speed_estimate_period=600.0,
    ) as bars:
        bar = bars.add_task("recordings", total=total)
        yield lambda: bars.advance(bar)


def _report(item: "Item", row: "Row") -> None:
    message = row["error"]["message"]
    fail(message if item.name in message else f"{item.name}: {message}")


def _print_summary(summary: "Summary", out: Path, show: OutputOptions) -> None:
    if show.as_json:
        write_json({"out": str(out), **asdict(summary)})
        return
    if show.quiet:
        return
    heard = f", {summary.audio_seconds:.0f} s of audio in {summary.seconds:.0f} s" if summary.seconds else ""
    note(f"{out}: {summary.done} of {summary.items} done now, {summary.skipped} before, {summary.failed} failed{heard}")
    if summary.failed_before:
        note(f"{summary.failed_before} failed in an earlier run; --retry processes them again")
