"""Evaluates afnext-tiny: words, events, counts and times, on voices and seeds that are not in training.

    python -m training.evaluate FOLDER [--parity]

FOLDER is that of `train` and `export`. Writes FOLDER/evaluation.json and .md. With --parity clips also
go through `transformers` in float32, and the tokens must be the same.
"""

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track

from afnext.bench.quality.answers import word_errors
from afnext.runtime.app.answer import Answer
from afnext.runtime.app.api import Model, load

from .scenes import Conditions, Item, Question, ask, ask_moment, lines, make_scene, moments, timestamp
from .voices import RATE, VoiceBank

CLEAN, NOISY = Conditions(None), Conditions(10.0)
_STAMP = re.compile(r"(\d\d):(\d\d)\.(\d)")
_LINE = re.compile(r'^(?:\d+\. )?\[(\d\d:\d\d\.\d)\] "?([^"\n]+?)"?$', re.MULTILINE)
_NEAR = 0.5  # largest time error in seconds of a found event that counts as correct
_BATCH = 4


@dataclass(frozen=True)
class Clip:
    """A recording, its items, and one question about it."""

    samples: np.ndarray
    items: list[Item]
    question: Question


@dataclass
class Row:
    """One line of the table: a test, its number of clips, and its results."""

    name: str
    clips: int
    values: dict[str, float] = field(default_factory=dict)
    stopped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"name": self.name, "clips": self.clips, "stopped": self.stopped, **self.values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Row":
        """The inverse of `to_dict`."""
        rest = {name: value for name, value in values.items() if name not in ("name", "clips", "stopped")}
        return cls(values["name"], values["clips"], rest, values["stopped"])


def clips(bank: VoiceBank, kind: str, count: int, seed: str, **options: Any) -> list[Clip]:
    """`count` recordings of 10 s with a question of `kind` each. options: conditions, density, think."""
    made = []
    for number in range(count):
        rng = random.Random(f"evaluation/{seed}/{number}")
        conditions, density = options.get("conditions", CLEAN), options.get("density")
        samples, items = make_scene(bank, rng, 10.0, conditions, density=density)
        made.append(Clip(samples, items, ask(kind, items, rng, options.get("think", False))))
    return made


def answers(model: Model, asked: list[Clip], name: str) -> Iterator[tuple[Clip, Answer]]:
    """The model's greedy answers, a few at a time, with a progress bar."""
    for start in track(range(0, len(asked), _BATCH), description=name):
        batch = asked[start : start + _BATCH]
        conversations = [[{"role": "user", "content": _parts(clip)}] for clip in batch]
        yield from zip(batch, model.chat(conversations, temperature=0.0, max_new_tokens=400), strict=True)


def _parts(clip: Clip) -> list[dict[str, Any]]:
    return [{"type": "audio", "audio": (clip.samples, RATE)}, {"type": "text", "text": clip.question.prompt}]


def seconds(stamp: str) -> float:
    """`mm:ss.d` in seconds."""
    match = _STAMP.fullmatch(stamp)
    assert match is not None
    minutes, whole, tenth = map(int, match.groups())
    return 60 * minutes + whole + tenth / 10


def listed(text: str) -> list[tuple[float, str]]:
    """The (seconds, label) of each line `[mm:ss.d] label`, numbered or not."""
    return [(seconds(stamp), label) for stamp, label in _LINE.findall(text)]


def matched(expected: list[tuple[float, str]], found: list[tuple[float, str]]) -> list[float]:
    """Time errors of the correctly found events: same label, each expected event used once, the nearest first."""
    pairs = sorted(
        (abs(at - when), i, j)
        for i, (at, label) in enumerate(expected)
        for j, (when, said) in enumerate(found)
        if label == said
    )
    errors: list[float] = []
    used: tuple[set[int], set[int]] = set(), set()
    for error, i, j in pairs:
        if i not in used[0] and j not in used[1]:
            errors.append(error)
            used[0].add(i)
            used[1].add(j)
    return errors


def _words(model: Model, asked: list[Clip], name: str) -> Row:
    row, texts = Row(name, len(asked)), []
    for clip, answer in answers(model, asked, name):
        texts.append((clip.question.answer, answer.text))
        row.stopped += answer.finish_reason == "stop"
    row.values = {"word error rate": _error_rate(texts)}
    return row


def _error_rate(texts: list[tuple[str, str]]) -> float:
    """Word error rate, from pairs of reference and hypothesis."""
    counts = [word_errors(*pair) for pair in texts]
    errors = sum(count[kind] for count in counts for kind in ("substitutions", "deletions", "insertions"))
    return errors / sum(count["words"] for count in counts)


def _events(model: Model, asked: list[Clip], name: str) -> Row:
    return _event_row(name, list(answers(model, asked, name)))


def _timed_words(model: Model, asked: list[Clip], name: str) -> Row:
    """Like `_events`, with the errors in the words alone."""
    heard = list(answers(model, asked, name))
    row = _event_row(name, heard)
    texts = [(_labels(clip.question.answer), _labels(answer.text)) for clip, answer in heard]
    row.values = {"word error rate": _error_rate(texts), **row.values}
    return row


def _labels(text: str) -> str:
    return " ".join(label for _, label in listed(text)) or "No speech."


def _event_row(name: str, heard: list[tuple[Clip, Answer]]) -> Row:
    row, right, expected_total, found_total = Row(name, len(heard)), 0, 0, 0
    times: list[float] = []
    for clip, answer in heard:
        expected, found = listed(clip.question.answer), listed(answer.text)
        errors = matched(expected, found)
        right += sum(error <= _NEAR for error in errors)
        times += errors
        expected_total += len(expected)
        found_total += len(found)
        row.stopped += answer.finish_reason == "stop"
    row.values = {"F1": 2 * right / max(1, expected_total + found_total), **_quantiles(times)}
    return row


def _accuracy(alike: Callable[[str, str], bool], model: Model, asked: list[Clip], name: str) -> Row:
    """Share of answers that are `alike` to the right one, without regard to thinking."""
    row, right = Row(name, len(asked)), 0
    for clip, answer in answers(model, asked, name):
        wanted = clip.question.answer.rpartition("</think>\n")[2]
        right += alike(wanted, answer.text)
        row.stopped += answer.finish_reason == "stop"
    row.values = {"accuracy": right / len(asked)}
    return row


def _exact(model: Model, asked: list[Clip], name: str) -> Row:
    return _accuracy(_alike, model, asked, name)


def _counts(model: Model, asked: list[Clip], name: str) -> Row:
    """Share of answers that end with the right number."""
    return _accuracy(lambda wanted, said: _last_word(wanted) == _last_word(said), model, asked, name)


def _last_word(text: str) -> str:
    return text.split()[-1] if text.split() else ""


def _alike(wanted: str, said: str) -> bool:
    """Whether two answers say the same, with times at most `_NEAR` apart."""
    if _STAMP.sub("", wanted) != _STAMP.sub("", said):
        return False
    pairs = zip(_STAMP.finditer(wanted), _STAMP.finditer(said), strict=True)
    return all(abs(seconds(a[0]) - seconds(b[0])) <= _NEAR for a, b in pairs)


def _quantiles(times: list[float]) -> dict[str, float]:
    return {"median error, s": float(np.median(times)), "90th percentile, s": float(np.quantile(times, 0.9))}


def long_recording(bank: VoiceBank, seed: int, minutes: float = 30.0) -> tuple[np.ndarray, list[Item]]:
    """A recording with one short scene in every tenth of its length and faint noise everywhere else."""
    rng = random.Random(f"evaluation/long/{seed}")
    samples = np.random.default_rng(seed).standard_normal(round(minutes * 60 * RATE)).astype(np.float32) * 1e-4
    tenth, items = minutes * 6, []
    for part in range(10):
        scene, inside = make_scene(bank, rng, 5.0, CLEAN, density=0.5)
        start = part * tenth + rng.uniform(0, tenth - 6)
        place = round(start * RATE)
        samples[place : place + len(scene)] += scene
        items += [Item(i.label, i.is_word, i.onset + start, i.end + start, i.pitch) for i in inside]
    return samples, items


Pairs = list[tuple[float, str]]
Heard = tuple[list[tuple[Clip, Answer]], Pairs, Pairs]


def hear_long(model: Model, bank: VoiceBank, recordings: int) -> list[Heard]:
    """For each recording of 30 minutes, the answers about times of items that occur once, and the expected and listed
    items."""
    numbers = track(range(recordings), description="30 minutes")
    return [_heard_long(model, *long_recording(bank, number)) for number in numbers]


def _heard_long(model: Model, samples: np.ndarray, items: list[Item]) -> Heard:
    with model.listen((samples, RATE)) as context:
        listing = context.ask("Describe the audio with timestamps.", temperature=0.0, max_new_tokens=1000)
        times = []
        for question in map(ask_moment, moments(items)):
            answer = context.ask(question.prompt, temperature=0.0, max_new_tokens=100)
            times.append((Clip(samples, items, question), answer))
    return times, listed(lines(items)), listed(listing.text)


def long_rows(heard: list[Heard]) -> list[Row]:
    """A row per tenth of 30 minutes: times of items that occur once, and F1 of one list of all items."""
    rows = []
    for part in range(10):
        inside = [
            (
                [(clip, answer) for clip, answer in times if _tenth(clip.question.evidence[0].onset) == part],
                [pair for pair in expected if _tenth(pair[0]) == part],
                [pair for pair in found if _tenth(pair[0]) == part],
            )
            for times, expected, found in heard
        ]
        rows.append(long_row(f"when, minutes {3 * part} to {3 * part + 3} of 30", inside))
    return rows


def long_row(name: str, heard: list[Heard]) -> Row:
    """Share of right moments, their time errors, and F1 of the lists."""
    asked = [pair for times, _, _ in heard for pair in times]
    row = Row(name, len(asked), stopped=sum(answer.finish_reason == "stop" for _, answer in asked))
    right = [_alike(clip.question.answer, answer.text) for clip, answer in asked]
    errors = [_first_error(clip.question.evidence[0].onset, answer.text) for clip, answer in asked]
    listed_right = sum(error <= _NEAR for _, *both in heard for error in matched(*both))
    listed_all = sum(len(pairs) for _, *both in heard for pairs in both)
    row.values = {"accuracy": sum(right) / len(right), **_quantiles(errors)} if asked else {}
    row.values["F1 of the list"] = 2 * listed_right / max(1, listed_all)
    return row


def _tenth(onset: float) -> int:
    return min(9, int(onset / 180))


def _first_error(onset: float, text: str) -> float:
    """Error of the first time in an answer, to the tenth of a second; without a time, the length of the recording."""
    said = _STAMP.search(text)
    return abs(seconds(said[0]) - seconds(timestamp(onset))) if said else 1800.0


@dataclass(frozen=True)
class Test:
    """The test of one row: name, scoring, question, and options of the recordings (see `clips`)."""

    name: str
    score: Callable[[Model, list[Clip], str], Row]
    kind: str
    seed: str
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, model: Model, bank: VoiceBank, count: int) -> Row:
        """The row for `count` clips."""
        return self.score(model, clips(bank, self.kind, count, self.seed, **self.options), self.name)


_SPEECH, _SOUNDS = {"density": 1.0}, {"density": 0.0}
TESTS = (
    Test("words, clean", _words, "transcribe", "clean", _SPEECH),
    Test("words, 10 dB noise", _words, "transcribe", "noisy", {"conditions": NOISY, **_SPEECH}),
    Test("words with times", _timed_words, "transcribe_times", "times", _SPEECH),
    Test("sounds with times", _events, "sounds_times", "events", _SOUNDS),
    Test("sounds, 10 dB noise", _events, "sounds_times", "e10", {"conditions": NOISY, **_SOUNDS}),
    Test("words and sounds", _events, "describe", "describe"),
    Test("counting sounds", _counts, "count_sound", "count", {"density": 0.2}),
    Test("counting sounds, thinking", _counts, "count_sound", "count", {"density": 0.2, "think": True}),
    Test("counting words", _counts, "count_words", "words"),
    Test("when does a sound occur", _exact, "when_sound", "when", {"density": 0.3}),
    Test("what happens first", _exact, "first", "first"),
    Test("what happens last", _exact, "last", "last"),
    Test("pitch of a tone", _exact, "pitch", "pitch", _SOUNDS),
)
HUMAN = Test("words, a human voice", _words, "transcribe", "human", _SPEECH)


def evaluate(model: Model, folder: Path, count: int, recordings: int) -> list[Row]:
    """All rows of the table. folder: the voice bank; count: clips per row; recordings: number of 30-minute ones."""
    bank = VoiceBank(folder, "held_out")
    rows = [test.run(model, bank, count) for test in TESTS]
    if (folder / "human.json").exists():
        rows.append(HUMAN.run(model, VoiceBank(folder, "human"), count))
    return rows + long_rows(hear_long(model, bank, recordings))


def parity(model: Model, folder: Path, source: Path, count: int) -> int:
    """Number of `count` clips whose tokens differ from those of `transformers`, in float32."""
    from .reference import reference_tokens

    bank, different = VoiceBank(folder, "held_out"), 0
    kinds = ("transcribe", "transcribe_times", "describe", "count_sound")
    asked = [clip for kind in kinds for clip in clips(bank, kind, count // len(kinds), f"parity/{kind}")]
    reference = reference_tokens(source, [(clip.samples, clip.question.prompt) for clip in asked])
    for (_, answer), expected in zip(answers(model, asked, "parity"), reference, strict=True):
        different += list(answer.token_ids) != expected
    return different


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    out = [f"| asked about | clips | {' | '.join(names)} | ended by itself |"]
    out.append("| --- " * (len(names) + 3) + "|")
    for row in rows:
        cells = [_cell(name, row.values.get(name)) for name in names]
        out.append(f"| {row.name} | {row.clips} | {' | '.join(cells)} | {row.stopped} |")
    return "\n".join(out) + "\n"


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if name.endswith(", s") else f"{100 * value:.1f} %" if "rate" in name else f"{value:.3f}"


def main(
    folder: Path,
    count: int = 100,
    recordings: int = 3,
    with_parity: bool = typer.Option(False, "--parity"),
) -> None:
    """Evaluate the checkpoint in FOLDER on the held-out voices there; see the module."""
    started = time.monotonic()
    bank, checkpoint, out = folder / "bank", folder / "checkpoint", folder / "evaluation"
    loaded = load(checkpoint, dtype="float32")
    rows = evaluate(loaded, bank, count, recordings)
    text = table(rows)
    if with_parity:
        different = parity(loaded, bank, checkpoint, count)
        text += f"\nTokens other than those of transformers (float32): {different} of {count} clips.\n"
    print(text)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    record = json.dumps([row.to_dict() for row in rows], indent=1)
    out.with_suffix(".json").write_text(record + "\n", encoding="utf-8")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
