"""What storing afnext-tiny in fewer bits costs: words, events, times and counts, scheme by scheme.

    python -m training.schemes FOLDER

FOLDER is that of `train` and `export`; the recordings are those of `evaluate`. Calibration hears voices of the
training. Writes FOLDER/schemes.json and .md.
"""

import json
import random
import tempfile
from pathlib import Path

import soundfile
import typer
from rich.console import Console

from afnext.quant.recipe import recipe
from afnext.runtime.app.api import Model, load
from afnext.runtime.app.calibration import calibrate

from .evaluate import TESTS, Row
from .scenes import ask, make_scene, random_conditions
from .voices import RATE, VoiceBank

NEAREST = (
    *("dense", "int8", "int8-w8a8", "int4-g32", "int4-g64", "int4-g128"),
    *("int4-g64-zeros", "int4-g64-w4a8", "nf4"),
)
CALIBRATED = ("int8", "int4-g32", "int4-g64", "int4-g128")
_SHOWN = ("words, clean", "words, 10 dB noise", "words with times", "sounds with times", "counting sounds")
_QUESTIONS = ("transcribe", "transcribe_times", "sounds_times", "describe", "count_sound")


def write_calibration_set(bank: VoiceBank, folder: Path, count: int = 40) -> None:
    """`count` recordings of 10 s with a question and its answer each, as `afnext quantize --calibrate` reads them."""
    for number in range(count):
        rng = random.Random(f"calibration/{number}")
        samples, items = make_scene(bank, rng, 10.0, random_conditions(rng))
        question = ask(_QUESTIONS[number % len(_QUESTIONS)], items, rng)
        soundfile.write(folder / f"{number:03}.wav", samples, RATE, subtype="FLOAT")
        (folder / f"{number:03}.txt").write_text(question.answer, encoding="utf-8")
        (folder / f"{number:03}.prompt.txt").write_text(question.prompt, encoding="utf-8")


def score(model: Model, bank: VoiceBank, count: int) -> list[Row]:
    """The rows of `evaluate` that tell most."""
    return [test.run(model, bank, count) for test in TESTS if test.name in _SHOWN]


def table(results: dict[str, list[Row]]) -> str:
    """The results in Markdown, a line a scheme."""
    first = next(iter(results.values()))
    columns = [(row.name, name) for row in first for name in row.values if name != "90th percentile, s"]
    lines = ["| scheme | " + " | ".join(f"{row}: {name}" for row, name in columns) + " | ended by itself |"]
    lines.append("| --- " * (len(columns) + 2) + "|")
    for scheme, rows in results.items():
        values = {(row.name, name): value for row in rows for name, value in row.values.items()}
        cells = [f"{100 * values[c]:.1f} %" if "rate" in c[1] else f"{values[c]:.3f}" for c in columns]
        ended = sum(row.stopped for row in rows) / sum(row.clips for row in rows)
        lines.append(f"| {scheme} | {' | '.join(cells)} | {100 * ended:.1f} % |")
    return "\n".join(lines) + "\n"


def main(folder: Path, count: int = 100) -> None:
    """Score the checkpoint in FOLDER stored by each scheme; see the module."""
    checkpoint, held_out = folder / "checkpoint", VoiceBank(folder / "bank", "held_out")
    results: dict[str, list[Row]] = {}
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory() as work:
        heard = Path(work, "recordings")
        heard.mkdir()
        write_calibration_set(VoiceBank(folder / "bank", "train"), heard)
        runs = [(name, checkpoint, None if name == "dense" else name, "auto") for name in NEAREST]
        runs += [("int4-small", checkpoint, "int4-small", "auto")]
        runs += [(f"dense, {kv} KV", checkpoint, None, kv) for kv in ("int8", "int4")]
        for name in CALIBRATED:
            packed = Path(work, name)
            calibrate(checkpoint, packed, recipe(name), heard)
            runs.append((f"{name}, calibrated", packed, None, "auto"))
        runs += [(f"int4-g64, calibrated, {kv} KV", Path(work, "int4-g64"), None, kv) for kv in ("int8", "int4")]
        for name, source, quant, kv in runs:
            console.print(f"[bold]{name}[/bold]")
            results[name] = score(load(source, dtype="float32", quant=quant, kv=kv), held_out, count)
    text = table(results)
    print(text)
    (folder / "schemes.md").write_text(text, encoding="utf-8")
    record = {scheme: [row.to_dict() for row in rows] for scheme, rows in results.items()}
    (folder / "schemes.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
