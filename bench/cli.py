"""`afnext bench`: measure speed, memory and quality, on any machine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .record import Record

app = typer.Typer(no_args_is_help=True, help="Measure speed, memory and quality.", rich_markup_mode="rich")

OutOption = Annotated[
    Path, typer.Option(help="File of results (JSON lines) to append to; what it holds is not redone.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]


@app.command(epilog="Example: [bold]afnext bench e2e --random full-width:2,2 --audio 30,300 --out results.jsonl[/bold]")
def e2e(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Checkpoint folder, or a name on the Hub.")] = None,
    random: Annotated[
        str | None, typer.Option(help="Shape of a random checkpoint: tiny, full-width:ENC,DEC or full.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="transformers, transformers,int8,nf4 or none.")] = "transformers",
    audio: Annotated[str, typer.Option(help="Lengths of the recordings, in seconds.")] = "30,300",
    scheme: Annotated[str, typer.Option(help="fp32, bf16, fp16; several with commas.")] = "bf16",
    batch: Annotated[str, typer.Option(help="Sequences decoded together.")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Length of the answers.", min=1)] = 16,
    repeats: Annotated[int, typer.Option(help="Rounds a stage.", min=1)] = 5,
    device: DeviceOption = "auto",
    out: OutOption = Path("results.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Every stage from audio to answer, beside the transformers reference."""
    from .e2e import run_e2e

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


def numbers(text: str, option: str) -> list[float]:
    """The numbers of a comma-separated option, all above 0. Raises typer.BadParameter."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} should be numbers with commas, as in 30,300", param_hint=option) from None
    if min(values) <= 0:
        raise typer.BadParameter(f"{text!r} holds a number that is not above 0", param_hint=option)
    return values


def show(records: list[Record], as_json: bool) -> None:
    """Print records as a table for people or as a JSON array."""
    if as_json:
        print(json.dumps([asdict(record) for record in records], ensure_ascii=False))
        return
    if not records:
        Console(stderr=True).print("nothing new to measure: the file of results holds all of it")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("case", "stage", "subject", "kind", "median", "rate", "speedup"):
        table.add_column(name, justify="right" if name in ("median", "rate", "speedup") else "left")
    for record in records:
        case = ", ".join(f"{value}" for value in record.case.values())
        table.add_row(case, record.name, record.subject, record.kind, *_figures(record))
    Console(highlight=False).print(table)


def _figures(record: Record) -> tuple[str, str, str]:
    values = record.values
    rates = {"tokens_per_s": "tokens/s", "windows_per_s": "windows/s", "real_time_factor": "x real time"}
    rate = next((f"{values[key]:.4g} {unit}" for key, unit in rates.items() if values.get(key) is not None), "")
    ratio = values.get("speedup")
    gain = f"{ratio:.2f}x" if ratio is not None else values.get("reason", "")
    return f"{1000 * values['median_s']:.4g} ms" if "median_s" in values else "", rate, gain
