"""`afnext bench`: measure speed, memory and quality, on any machine."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..kernels.errors import BackendError
from ..kernels.triton_language import AVAILABLE as TRITON_AVAILABLE
from ..runtime.app.api import load
from ..runtime.app.cli.options import DeviceOption, JsonOption, ModelOption
from ..runtime.engine.kv_cache import KV_STORAGE
from ..runtime.model.hub import BUNDLED
from .core.record import DENSE_SCHEMES, SCHEMES, Record, recipe_of
from .ops.cli import ops
from .quality.card.published import NAMES as CARD_NAMES
from .quality.data import TASKS

app = typer.Typer(no_args_is_help=True, help="Measure speed, memory and quality.", rich_markup_mode="rich")

app.command(epilog="Example: [bold]afnext bench ops --op decode_attention --list[/bold]")(ops)

OutOption = Annotated[
    Path, typer.Option(help="File of results (JSON lines) to append to; cases that it already has are skipped.")
]


@app.command(epilog="Example: [bold]afnext bench e2e --random full-width:2,2 --audio 30,300 --out results.jsonl[/bold]")
def e2e(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Checkpoint folder, or a name on the Hub.")] = None,
    random: Annotated[
        str | None, typer.Option(help="Shape of a random checkpoint: tiny, full-width:ENC,DEC or full.")
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="none, or a comma-separated list of: transformers, compiled, int8, nf4, hqq, torchao.")
    ] = "transformers",
    audio: Annotated[str, typer.Option(help="Lengths of the recordings in seconds, comma-separated.")] = "30,300",
    scheme: Annotated[str, typer.Option(help=f"{', '.join(SCHEMES)}; comma-separated.")] = "bf16",
    batch: Annotated[str, typer.Option(help="Batch sizes of decode, comma-separated.")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Tokens per answer.", min=1)] = 16,
    repeats: Annotated[int, typer.Option(help="Repetitions per stage.", min=1)] = 5,
    device: DeviceOption = "auto",
    out: OutOption = Path("results.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Time every stage from audio to answer, compared with the transformers reference."""
    from .model.e2e import run_e2e

    records = run_e2e(
        out=out,
        model=model,
        random=random,
        baseline=baseline,
        audio_seconds=numbers(audio, "--audio"),
        schemes=scheme.split(","),
        batches=[int(value) for value in numbers(batch, "--batch")],
        new_tokens=new_tokens,
        repeats=repeats,
        device=device,
        quiet=as_json,
    )
    show(records, as_json)


@app.command(epilog="Example: [bold]afnext bench kernels --dtype bf16 --operation attention --out results.jsonl[/bold]")
def kernels(
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16; comma-separated.")] = "bf16",
    operation: Annotated[list[str] | None, typer.Option(help="Only this operation; repeat for more.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes: a check that everything runs, not a measurement.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Repetitions per case.", min=1)] = 5,
    warm_cache: Annotated[
        bool, typer.Option("--warm-cache", help="Do not flush the caches between repetitions.")
    ] = False,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="Time replayed CUDA graphs, which excludes launch overhead.")
    ] = False,
    device: DeviceOption = "auto",
    out: OutOption = Path("results.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Time each operation at the shapes of the real model, compared with torch and other installed libraries."""
    from .ops.kernels import run_kernels

    records = run_kernels(
        out,
        device=device,
        dtypes=[DENSE_SCHEMES[choice(name, tuple(DENSE_SCHEMES), "--dtype")] for name in dtype.split(",")],
        operations=operation or (),
        quick=quick,
        repeats=repeats,
        cold_cache=not warm_cache,
        graphs=graphs,
        progress=not as_json,
    )
    show(records, as_json)


@app.command(epilog="Example: [bold]afnext bench llama-cpp --random full-width:32,4 --depths 0,8192[/bold]")
def llama_cpp(
    random: Annotated[str, typer.Option(help="Shape of the random weights: full-width:ENC,DEC or full.")] = "full",
    scheme: Annotated[
        str,
        typer.Option(
            help=f"Schemes of afnext: {', '.join(SCHEMES)}, q4_k; comma-separated; with '+kv8', '+kvfp8' or '+kv4' for "
            "an int8, fp8 or int4 KV cache."
        ),
    ] = "int4",
    kind: Annotated[
        str, typer.Option(help="Formats of llama.cpp: q4_0, q4_k_m, q8_0, bf16; comma-separated.")
    ] = "q4_0",
    stages: Annotated[str, typer.Option(help="encode, prefill, decode; comma-separated.")] = "encode,prefill,decode",
    depths: Annotated[str, typer.Option(help="Tokens in the KV cache before the timed ones, comma-separated.")] = "0",
    chunk: Annotated[int, typer.Option(help="Tokens per prefill chunk.", min=1)] = 512,
    repeats: Annotated[int, typer.Option(help="Repetitions per case.", min=1)] = 5,
    fewer: Annotated[
        int | None,
        typer.Option(
            "--fewer-layers",
            help="Time decode steps also with this many decoder layers, and extrapolate to the full model.",
            min=1,
        ),
    ] = None,
    out: OutOption = Path("results.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Time the encoder, prefill and decode compared with llama.cpp, on random weights, at any context length."""
    from .model.layers import STAGES
    from .model.llama_cpp_comparison import run_llama_cpp

    records = run_llama_cpp(
        out,
        shape=random,
        schemes=scheme.split(","),
        kinds=kind.split(","),
        stages=[choice(stage, STAGES, "--stages") for stage in stages.split(",")],
        depths=[int(depth) for depth in numbers(depths, "--depths", least=0)],
        chunk=chunk,
        repeats=repeats,
        fewer=fewer,
        quiet=as_json,
    )
    show(records, as_json)


@app.command(epilog="Example: [bold]afnext bench layers --random full-width:2,2 --scheme bf16,int8,int4[/bold]")
def layers(
    random: Annotated[str, typer.Option(help="Shape of a random checkpoint: tiny or full-width:ENC,DEC.")],
    scheme: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(SCHEMES)}; append '+kv8', '+kvfp8' or '+kv4' for an int8, fp8 or int4 KV cache."
        ),
    ] = "bf16",
    baseline: Annotated[
        str,
        typer.Option(help="Dtypes of transformers, bf16 or fp32; speedups are relative to the first."),
    ] = "bf16",
    stages: Annotated[str, typer.Option(help="encode, prefill, decode; comma-separated.")] = "encode,prefill,decode",
    chunk: Annotated[int, typer.Option(help="Tokens per prefill chunk.", min=1)] = 1024,
    prefixes: Annotated[
        str, typer.Option(help="Tokens in the KV cache before the prefill chunk, comma-separated.")
    ] = "0,16000",
    depths: Annotated[
        str, typer.Option(help="Tokens in the KV cache before the decoded one, comma-separated.")
    ] = "0,8192,45000",
    repeats: Annotated[int, typer.Option(help="Repetitions per case.", min=1)] = 7,
    out: OutOption = Path("results.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Time the layers of every scheme on the CPU compared with transformers, with a KV cache of any length."""
    from .model.layers import BASELINES, STAGES, run_layers

    records = run_layers(
        out,
        shape=random,
        schemes=scheme.split(","),
        baselines=[choice(name, BASELINES, "--baseline") for name in baseline.split(",")],
        stages=[choice(stage, STAGES, "--stages") for stage in stages.split(",")],
        chunk=chunk,
        prefixes=[int(depth) for depth in numbers(prefixes, "--prefixes", least=0)],
        depths=[int(depth) for depth in numbers(depths, "--depths", least=0)],
        repeats=repeats,
        quiet=as_json,
    )
    show(records, as_json)


@app.command(epilog="Example: [bold]afnext bench serving --random full-width:1,1 --audio 1800[/bold]")
def serving(
    random: Annotated[str, typer.Option(help="Shape of a random checkpoint: tiny, full-width:ENC,DEC or full.")],
    audio: Annotated[float, typer.Option(help="Length in seconds of the recording that gets two questions.")] = 1800.0,
    lengths: Annotated[
        str, typer.Option(help="Lengths in seconds of the recording that is fed live, comma-separated.")
    ] = "300,600,1200,1800",
    repeats: Annotated[int, typer.Option(help="Repetitions of the throughput test.", min=1)] = 3,
    scheme: Annotated[str, typer.Option(help=f"{', '.join(SCHEMES)}.")] = "bf16",
    out: OutOption = Path("results.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Measure a second question about a recording, memory while listening live, and concurrent requests."""
    from .model.serving import run_serving

    records = run_serving(
        out,
        shape=random,
        seconds=audio,
        lengths=numbers(lengths, "--lengths"),
        repeats=repeats,
        scheme=choice(scheme, tuple(SCHEMES), "--scheme"),
    )
    if as_json:
        show(records, as_json)
        return
    for record in records:
        case = ", ".join(f"{name} {value}" for name, value in record.case.items())
        figures = ", ".join(f"{name} {value:,.4g}" for name, value in record.values.items())
        print(f"{record.name} ({case}): {figures}")


@app.command(epilog="Example: [bold]afnext bench ranks --random full-width:1,4 --ways tp1,tp2,sp2[/bold]")
def ranks(
    random: Annotated[str, typer.Option(help="Shape of a random checkpoint: tiny, full-width:ENC,DEC or full.")],
    ways: Annotated[
        str, typer.Option(help="tp, sp or copies (whole models), each with a number of processes, comma-separated.")
    ] = "tp1,tp2",
    audio: Annotated[float, typer.Option(help="Length of the recording in seconds.", min=1.0)] = 30.0,
    new_tokens: Annotated[int, typer.Option(help="Tokens per answer.", min=2)] = 32,
    repeats: Annotated[int, typer.Option(help="Repetitions.", min=1)] = 5,
    scheme: Annotated[str, typer.Option(help=f"{', '.join(SCHEMES)}.")] = "bf16",
    requests: Annotated[int, typer.Option(help="Concurrent questions.", min=1)] = 1,
    out: OutOption = Path("results.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Compare models in one process and in several: time to first token and tokens per second."""
    from .model.ranks import WAYS, run_ranks

    records = run_ranks(
        out,
        shape=random,
        ways=[choice(way, WAYS, "--ways") for way in ways.split(",")],
        seconds=audio,
        new_tokens=new_tokens,
        repeats=repeats,
        scheme=choice(scheme, tuple(SCHEMES), "--scheme"),
        requests=requests,
    )
    if as_json:
        show(records, as_json)
        return
    for record in records:
        values = record.values
        print(f"{record.subject}: first token {values['first_s']:.2f} s, {values['tokens_per_s']:.2f} tokens/s")


@app.command(epilog="Example: [bold]afnext bench http --clients 1,32 --seconds 10[/bold]")
def http(
    url: Annotated[
        str | None, typer.Option(help="Address of the server to test; by default a server is started for the test.")
    ] = None,
    model: ModelOption = BUNDLED,
    random: Annotated[
        str | None, typer.Option(help="Shape of random weights to serve: tiny, full-width:ENC,DEC or full.")
    ] = None,
    scheme: Annotated[str, typer.Option(help=f"Scheme of the random weights: {', '.join(SCHEMES)}.")] = "bf16",
    clients: Annotated[str, typer.Option(help="Numbers of concurrent clients, comma-separated.")] = "1,8,32,128",
    seconds: Annotated[
        float, typer.Option(help="Seconds per number of clients, for HTTP and for the direct API each.", min=0.0)
    ] = 20.0,
    minutes: Annotated[
        float, typer.Option(help="Minutes of the whole run; what would not end in time is left out.", min=0.0)
    ] = 8.0,
    api_key: Annotated[str, typer.Option(help="API key of the server.", envvar="AFNEXT_API_KEY")] = "",
    out: Annotated[Path, typer.Option(help="File of results (JSON lines) to append to.")] = Path("results.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Load-test the HTTP server: against the direct API, during uploads, overloaded. At most `--minutes`."""
    from .model.serving_http import run_http

    counts = [int(count) for count in numbers(clients, "--clients", least=1)]
    records = run_http(
        out,
        url=url,
        model=model,
        clients=counts,
        seconds=seconds,
        api_key=api_key,
        random=random,
        scheme=choice(scheme, tuple(SCHEMES), "--scheme"),
        minutes=minutes,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if as_json:
        show(records, as_json)
        return
    for name in dict.fromkeys(record.name for record in records):
        _show_figures(name, [record for record in records if record.name == name])


def _show_figures(title: str, records: list[Record]) -> None:
    """A row for each record, with all of its figures."""
    names = list(dict.fromkeys(name for record in records for name in record.values))
    table = Table("clients", "subject", *names, title=title, title_justify="left", box=None, pad_edge=False)
    for record in records:
        figures = (record.values.get(name) for name in names)
        shown = ("" if value is None else f"{value:.4g}" for value in figures)
        table.add_row(str(record.case["clients"]), record.subject, *shown)
    Console(highlight=False, width=None if sys.stdout.isatty() else 240).print(table)


@app.command(epilog="Example: [bold]afnext bench quality librispeech/ -m CHECKPOINT --out wer.csv[/bold]")
def quality(
    data: Annotated[Path, typer.Argument(help="A manifest (JSON lines, MMAU-style JSON) or the folder of one.")],
    model: ModelOption = BUNDLED,
    task: Annotated[str, typer.Option(help="asr, choice, perplexity, or auto by the manifest.")] = "auto",
    baseline: Annotated[str | None, typer.Option(help="Model to compare with, for perplexity.")] = None,
    baseline_scheme: Annotated[
        str | None, typer.Option(help="Scheme of the baseline; its checkpoint's by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first N rows.", min=1)] = None,
    scheme: Annotated[str | None, typer.Option(help=f"{', '.join(SCHEMES)}; the checkpoint's by default.")] = None,
    kv: Annotated[str, typer.Option(help=f"Format of keys and values: {', '.join(KV_STORAGE)}.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per answer.", min=1)] = 512,
    restart: Annotated[bool, typer.Option("--restart", help="Discard existing rows and start again.")] = False,
    device: DeviceOption = "auto",
    out: Annotated[
        Path, typer.Option(help="CSV file with one row per item; the summary is written next to it.")
    ] = Path("quality.csv"),
    as_json: JsonOption = False,
) -> None:
    """Measure word error rate, multiple-choice accuracy, or perplexity and divergence from another model."""
    from .core.machine import machine
    from .quality.answers import run_quality

    dtype = dtype_name(scheme) if scheme else "auto"
    loaded = load(model, device=device, dtype=dtype, kv=choice(kv, KV_STORAGE, "--kv"), quant=recipe_of(scheme))
    other_dtype = dtype_name(baseline_scheme) if baseline_scheme else "auto"
    other = load(baseline, device=device, dtype=other_dtype, quant=recipe_of(baseline_scheme)) if baseline else None
    with bar("scoring", hidden=as_json) as report:
        record = run_quality(
            loaded,
            data,
            out,
            baseline=other,
            task=choice(task, ("auto", *TASKS), "--task"),
            limit=limit,
            max_new_tokens=max_new_tokens,
            restart=restart,
            machine=machine(),
            progress=report,
        )
    if as_json:
        print(json.dumps(asdict(record), ensure_ascii=False))
    else:
        for name, value in record.values.items():
            print(f"{name}: {value}")


@app.command(epilog="Example: [bold]afnext bench card librispeech-clean LibriSpeech/ -m next --scheme bf16,int4[/bold]")
def card(
    dataset: Annotated[str, typer.Argument(help=f"{', '.join(CARD_NAMES)} (such as covost2-en-de).")],
    source: Annotated[str, typer.Argument(help="A local copy in its published layout, or 'hub' to download it.")],
    model: ModelOption = BUNDLED,
    scheme: Annotated[str, typer.Option(help=f"{', '.join(SCHEMES)}; comma-separated.")] = "bf16",
    batch: Annotated[int, typer.Option(help="Concurrent questions.", min=1)] = 8,
    limit: Annotated[int | None, typer.Option(help="Score only the first N items.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per answer.", min=1)] = 512,
    judge: Annotated[
        str | None,
        typer.Option(help="OpenAI-compatible address of a judge of open answers, such as http://localhost:8000/v1."),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="Name of the judge's model at that address.")] = "",
    restart: Annotated[bool, typer.Option("--restart", help="Discard existing rows and start again.")] = False,
    device: DeviceOption = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder for one CSV per dataset and scheme; existing rows are kept.")
    ] = Path("card"),
    as_json: JsonOption = False,
) -> None:
    """Reproduce the model card's figures on the published datasets, with confidence intervals."""
    from .quality.card.judge import Judge
    from .quality.card.run import run_card
    from .quality.card.run import show as show_card

    if judge is not None and not judge_model:
        raise typer.BadParameter("name the model at --judge", param_hint="--judge-model")
    with bar("scoring", hidden=as_json) as report:
        figures = run_card(
            dataset,
            source,
            out,
            model=model,
            device=device,
            schemes=scheme.split(","),
            batch=batch,
            limit=limit,
            max_new_tokens=max_new_tokens,
            judge=Judge(judge, judge_model) if judge else None,
            restart=restart,
            progress=report,
        )
    if as_json:
        print(json.dumps([asdict(figure.record) for figure in figures], ensure_ascii=False))
    else:
        show_card(figures, Console(highlight=False, width=None if sys.stdout.isatty() else 160))


@app.command(
    epilog="Example: [bold]afnext bench quantization --model FOLDER --data clips/ --calibrate recordings/[/bold]"
)
def quantization(
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Dense checkpoint to quantize and score.")] = None,
    whisper: Annotated[Path | None, typer.Option(help="Folder of Whisper tiny.en's model.bin and tokenizer.")] = None,
    data: Annotated[Path | None, typer.Option(help="Manifest of recordings with transcripts, or its folder.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Folder of recordings for calibration, none of which may be in --data.")
    ] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="Only this scheme or recipe; repeat for more.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for quantization.md and .json; rows that they already have are skipped.")
    ] = Path("bench/results"),
    as_json: JsonOption = False,
) -> None:
    """Measure the loss of each scheme: layer errors, and word error rates of Whisper and of a checkpoint."""
    from ..quant.recipe import SMALL
    from .quality import quantization as measured

    results = measured.Results(out / "quantization.json")
    schemes = measured.SCHEMES if not scheme else tuple(name for name in scheme if name != SMALL)
    measured.measure_layers(results, schemes)
    if model or whisper:
        if data is None or calibrate is None:
            raise typer.BadParameter("give --data and --calibrate too", param_hint="--model, --whisper")
        with bar("scoring", hidden=as_json) as report:
            if whisper is not None:
                measured.measure_speech(results, whisper, data, calibrate, schemes, progress=report)
            if model is not None:
                recipes = tuple(scheme or measured.MODEL_RECIPES)
                measured.measure_model(results, model, data, calibrate, recipes, progress=report)
    text = measured.tables(results.rows)
    (out / "quantization.md").write_text(text, encoding="utf-8")
    print(json.dumps([asdict(row) for row in results.rows]) if as_json else text)


@app.command(epilog="Example: [bold]afnext bench report results.jsonl --out report/[/bold]")
def report(
    results: Annotated[list[Path], typer.Argument(help="Files of results, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md and the plots.")] = Path("report"),
    as_json: JsonOption = False,
) -> None:
    """Write one page with plots: stages, roofline, context length, memory, speedups."""
    from .report.page import write_report

    pages = write_report(results, out)
    print(json.dumps([str(page) for page in pages]) if as_json else "\n".join(map(str, pages)))


@app.command(epilog="Example: [bold]afnext bench tables docs/performance.md --results bench/results[/bold]")
def tables(
    page: Annotated[Path, typer.Argument(help="Markdown page with parts marked <!-- results: FILE.jsonl -->.")],
    results: Annotated[Path, typer.Option(help="Folder with the files of results.")] = Path("bench/results"),
) -> None:
    """Fill the marked parts of a page with tables of results: one row per case, one column per subject."""
    from .report.tables import update

    print(f"{page}: {'updated' if update(page, results) else 'nothing changed'}")


@app.command(epilog="Example: [bold]afnext bench compare before.jsonl after.jsonl[/bold]")
def compare(
    a: Annotated[Path, typer.Argument(help="First file of results.")],
    b: Annotated[Path, typer.Argument(help="Second file of results.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two files of results: the ratio per case, and whether it exceeds the spread."""
    from .report.compare import compare as paired
    from .report.compare import render, to_dict

    comparison = paired(a, b)
    if as_json:
        print(json.dumps(to_dict(comparison), ensure_ascii=False))
    else:
        Console(highlight=False).print(render(comparison))


@app.command(epilog="Example: [bold]afnext bench codegen --out bench/results[/bold]")
def codegen(
    target: Annotated[list[str] | None, typer.Option(help="Only this chip (sm_90, ...); repeat for more.")] = None,
    operation: Annotated[list[str] | None, typer.Option(help="Only this operation; repeat for more.")] = None,
    workers: Annotated[int, typer.Option(help="Number of compiling processes; 0 compiles in this process.", min=0)] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder for codegen.md and codegen.json.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile the Triton kernels for every chip, without a GPU: registers, spills, tensor cores, projected times.

    Exits with status 1 if a kernel spills, does not fit a chip, or multiplies matrices without tensor cores.
    """
    if not TRITON_AVAILABLE:
        raise BackendError("Triton is not installed here, and compiles the kernels; it comes with afnext on Linux")
    from .codegen.audit import audit, to_dict
    from .codegen.report import show_audit, write_audit

    with bar("tracing, then compiling", hidden=as_json) as report:
        result = audit(targets=target or (), operations=operation or (), workers=workers, progress=report)
    if out is not None:
        write_audit(result, out)
    if as_json:
        print(json.dumps(to_dict(result), ensure_ascii=False))
    else:
        show_audit(result, Console(highlight=False, width=None if sys.stdout.isatty() else 200))
    for offender in result.offenders:
        Console(stderr=True, highlight=False).print(f"[red]fails[/]: {escape(offender)}")
    if result.offenders:
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]afnext bench first-run --device cuda --minutes 10[/bold]")
def first_run(
    minutes: Annotated[float, typer.Option(help="Time limit of the whole run, in minutes.", min=0.1)] = 10.0,
    out: Annotated[
        Path, typer.Option(help="Folder for results and archive; steps that it already has are skipped.")
    ] = Path("first-run"),
    device: DeviceOption = "auto",
) -> None:
    """Test a new GPU, most important steps first: kernels, CUDA graphs, answers, end to end, times.

    Each step runs in a separate process. The same command continues an interrupted run. All results are in one
    archive, first-run.zip.
    """
    from .first_run.run import first_run

    raise typer.Exit(first_run(out, device=device, minutes=minutes, say=lambda line: print(line, flush=True)))


@app.command(epilog="Example: [bold]afnext bench all --out bench/results[/bold]")
def all(
    out: Annotated[Path, typer.Option(help="Folder for the results and the report.")] = Path("bench/results"),
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Regenerate the committed results: kernels, end to end at full width with two layers, and the report."""
    from .model.e2e import run_e2e
    from .ops.kernels import run_kernels
    from .report.page import write_report

    results = out / "results.jsonl"
    run_kernels(results, device=device, progress=not as_json)
    run_e2e(
        out=results,
        random="full-width:2,2",
        audio_seconds=(30.0, 120.0),
        new_tokens=4,
        repeats=7,
        device=device,
        quiet=as_json,
    )
    pages = write_report([results], out)
    print(json.dumps([str(page) for page in pages]) if as_json else "\n".join(map(str, pages)))


def numbers(text: str, option: str, *, least: float | None = None) -> list[float]:
    """The numbers of a comma-separated option, all above 0, or from `least` on. Raises typer.BadParameter."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a comma-separated list of numbers, such as 30,300", param_hint=option
        ) from None
    if min(values) <= 0 if least is None else min(values) < least:
        bound = "above 0" if least is None else f"at least {least:g}"
        raise typer.BadParameter(f"{text!r} has a number that is not {bound}", param_hint=option)
    return values


def dtype_name(scheme: str) -> str:
    """The dtype that a scheme computes in. Raises typer.BadParameter for an unknown one."""
    return SCHEMES[choice(scheme, tuple(SCHEMES), "--scheme")]


def choice(value: str, allowed: Sequence[str], option: str) -> Any:
    """`value` if it is one of `allowed`. Raises typer.BadParameter otherwise."""
    if value not in allowed:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}", param_hint=option)
    return value


@contextmanager
def bar(name: str, *, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; yields what to call with (done, total)."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=hidden or not console.is_terminal) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def show(records: list[Record], as_json: bool) -> None:
    """Print records as a table for people or as a JSON array."""
    if as_json:
        print(json.dumps([asdict(record) for record in records], ensure_ascii=False))
        return
    if not records:
        Console(stderr=True).print("nothing new to measure: the file of results has every case")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("case", "what", "subject", "kind", "median", "rate", "speedup"):
        table.add_column(name, justify="right" if name in ("median", "rate", "speedup") else "left", no_wrap=True)
    for record in records:
        table.add_row(_case(record), record.name, record.subject, record.kind, *_figures(record))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _case(record: Record) -> str:
    case = record.case
    if "audio_seconds" in case:
        return f"{case['audio_seconds']:g} s x {case['batch']}, layers {'+'.join(map(str, case['layers']))}"
    return str(case.get("label", ""))


def _figures(record: Record) -> tuple[str, str, str]:
    values = record.values
    rates = {
        "tokens_per_s": "tokens/s",
        "windows_per_s": "windows/s",
        "real_time_factor": "x real time",
        "percent_of_ceiling": "% of ceiling",
    }
    rate = next((f"{values[key]:.4g} {unit}" for key, unit in rates.items() if values.get(key) is not None), "")
    ratio = values.get("speedup")
    gain = f"{ratio:.2f}x" if ratio is not None else values.get("reason", values.get("no_speedup", ""))
    return f"{1000 * values['median_s']:.4g} ms" if "median_s" in values else "", rate, gain
