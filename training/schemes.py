"""The loss by quantization of afnext-tiny: words, events, times and counts, scheme by scheme.

    python -m training.schemes FOLDER

FOLDER is that of `train` and `export`; the recordings are those of `evaluate`. Calibration uses voices from training.
Writes every row at once to FOLDER/schemes.json, from which a stopped run continues, and a table to FOLDER/schemes.md.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import soundfile
import typer
from rich.console import Console

from afnext.quant.recipe import RECIPES, recipe
from afnext.runtime.app.api import Model, load
from afnext.runtime.app.calibration import calibrate

from .evaluate import TESTS, Row, hear_long, long_row
from .scenes import ask, make_scene, random_conditions
from .voices import RATE, VoiceBank


@dataclass(frozen=True)
class Storage:
    """How a checkpoint is stored. scheme: "dense", a scheme or a recipe; kv: see `load`."""

    scheme: str = "dense"
    calibrated: bool = False
    kv: str = "auto"

    @property
    def name(self) -> str:
        """For display: int4-g64, calibrated, int8 KV."""
        kv = "" if self.kv == "auto" else f", {self.kv} KV"
        return f"{self.scheme}{', calibrated' if self.calibrated else ''}{kv}"


NEAREST = ("dense", *(recipe(name).name for name in RECIPES), "int4-g32", "int4-g128", "int4-g64-zeros")
"""All recipes, by the names that stored weights have, and other groups."""
CALIBRATED = ("int8", "int4-g32", "int4-g64", "int4-g128", "small", "int3-g64")
SHORT = (
    *map(Storage, NEAREST),
    *(Storage(kv=kv) for kv in ("int8", "int4")),
    *(Storage(name, calibrated=True) for name in CALIBRATED),
    *(Storage("int4-g64", calibrated=True, kv=kv) for kv in ("int8", "int4")),
    Storage("small", kv="int4"),
)
"""What is asked about short recordings."""
LONG = (
    *(Storage(kv=kv) for kv in ("auto", "int8", "int4")),
    *(Storage("int4-g64", kv=kv) for kv in ("int8", "int4")),
    Storage("small", kv="int4"),
)
"""What is asked about recordings of 30 minutes."""
_SHOWN = ("words, clean", "words, 10 dB noise", "words with times", "sounds with times", "counting sounds")
_LIST = "F1 of the list"
_QUESTIONS = ("transcribe", "transcribe_times", "sounds_times", "describe", "count_sound")


def write_calibration_set(bank: VoiceBank, folder: Path, count: int = 40) -> None:
    """Write `count` recordings of 10 s, each with a question and its answer, for `afnext quantize --calibrate`."""
    for number in range(count):
        rng = random.Random(f"calibration/{number}")
        samples, items = make_scene(bank, rng, 10.0, random_conditions(rng))
        question = ask(_QUESTIONS[number % len(_QUESTIONS)], items, rng)
        soundfile.write(folder / f"{number:03}.wav", samples, RATE, subtype="FLOAT")
        (folder / f"{number:03}.txt").write_text(question.answer, encoding="utf-8")
        (folder / f"{number:03}.prompt.txt").write_text(question.prompt, encoding="utf-8")


def score(model: Model, bank: VoiceBank, count: int) -> list[Row]:
    """The most informative rows of `evaluate`."""
    return [test.run(model, bank, count) for test in TESTS if test.name in _SHOWN]


def long_scores(model: Model, bank: VoiceBank, count: int) -> list[Row]:
    """A row for each of `count` recordings of 30 minutes: times of events that occur once, and one list of all."""
    return [long_row(f"recording {number}", [heard]) for number, heard in enumerate(hear_long(model, bank, count))]


def table(results: Mapping[Storage, list[Row]]) -> str:
    """The results in Markdown, a line per storage."""
    first = next(iter(results.values()))
    columns = [(row.name, name) for row in first for name in row.values if name != "90th percentile, s"]
    lines = ["| scheme | " + " | ".join(f"{row}: {name}" for row, name in columns) + " | ended by itself |"]
    lines.append("| --- " * (len(columns) + 2) + "|")
    for storage, rows in results.items():
        values = {(row.name, name): value for row in rows for name, value in row.values.items()}
        cells = [f"{100 * values[c]:.1f} %" if "rate" in c[1] else f"{values[c]:.3f}" for c in columns]
        ended = sum(row.stopped for row in rows) / sum(row.clips for row in rows)
        lines.append(f"| {storage.name} | {' | '.join(cells)} | {100 * ended:.1f} % |")
    return "\n".join(lines) + "\n"


def long_table(results: Mapping[Storage, list[Row]]) -> str:
    """The results of `long_scores` in Markdown, a line per storage. An int4 KV cache is compared with int8 for the same
    weights, recording by recording; mean and standard error."""
    lines = ["| scheme | recordings | right times | F1 of the list | F1, difference to int8 KV |"]
    lines.append("| --- " * 5 + "|")
    for storage, rows in results.items():
        f1 = [row.values[_LIST] for row in rows]
        compared = results.get(replace(storage, kv="int8"), []) if storage.kv == "int4" else []
        gains = [at - row.values[_LIST] for at, row in zip(f1, compared, strict=bool(compared))]
        right = sum(round(row.values.get("accuracy", 0.0) * row.clips) for row in rows)
        times = f"{right} of {sum(row.clips for row in rows)}"
        lines.append(f"| {storage.name} | {len(rows)} | {times} | {_mean(f1)} | {_mean(gains, '+')} |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float], sign: str = "") -> str:
    """Mean and standard error; empty without values."""
    if not values:
        return ""
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{error}"


class Stored:
    """The checkpoint in a folder, to be loaded in different forms. work: a folder for calibrated copies."""

    def __init__(self, folder: Path, work: Path):
        self._checkpoint, self._bank, self._work = folder / "checkpoint", folder / "bank", work

    def load(self, storage: Storage) -> Model:
        """The model, computing in float32."""
        if storage.calibrated:
            return load(self._calibrated(storage.scheme), dtype="float32", kv=storage.kv)
        quant = None if storage.scheme == "dense" else storage.scheme
        return load(self._checkpoint, dtype="float32", quant=quant, kv=storage.kv)

    def _calibrated(self, scheme: str) -> Path:
        packed, heard = self._work / scheme, self._work / "recordings"
        if not heard.exists():
            heard.mkdir()
            write_calibration_set(VoiceBank(self._bank, "train"), heard)
        if not packed.exists():
            calibrate(self._checkpoint, packed, recipe(scheme), heard)
        return packed


class Results:
    """The rows in a JSON file, by part and storage; every new row is written at once."""

    def __init__(self, path: Path):
        self._path = path
        self._parts: dict[str, dict[str, list[dict[str, Any]]]] = {}
        if path.exists():
            self._parts = json.loads(path.read_text(encoding="utf-8"))

    def complete(self, part: str, storages: Iterable[Storage], measure: Callable[[Storage], list[Row]]) -> None:
        """Measure the missing rows."""
        for storage in storages:
            if storage.name not in self._parts.setdefault(part, {}):
                Console(stderr=True, highlight=False).print(f"[bold]{part}: {storage.name}[/bold]")
                self._parts[part][storage.name] = [row.to_dict() for row in measure(storage)]
                self._path.write_text(json.dumps(self._parts, indent=1) + "\n", encoding="utf-8")

    def rows(self, part: str, storages: Iterable[Storage]) -> dict[Storage, list[Row]]:
        """The rows of a part, in this order."""
        return {each: list(map(Row.from_dict, self._parts[part][each.name])) for each in storages}


def main(folder: Path, count: int = 100, recordings: int = 3) -> None:
    """Score the checkpoint in FOLDER stored in several ways; see the module. count: clips a row; recordings: of 30
    minutes. Both must be those of a run that is continued."""
    held_out = VoiceBank(folder / "bank", "held_out")
    results = Results(folder / "schemes.json")
    with tempfile.TemporaryDirectory() as work:
        stored = Stored(folder, Path(work))
        results.complete("10 s", SHORT, lambda storage: score(stored.load(storage), held_out, count))
        results.complete("30 minutes", LONG, lambda storage: long_scores(stored.load(storage), held_out, recordings))
    text = f"{table(results.rows('10 s', SHORT))}\n{long_table(results.rows('30 minutes', LONG))}"
    print(text)
    (folder / "schemes.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
