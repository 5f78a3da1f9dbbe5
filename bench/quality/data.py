"""Manifests of quality benchmarks, and the comparison of answers with them.

    asr         {"audio": "clip.wav", "text": "what is said"}              also NeMo's "audio_filepath"
    choice      {"audio_id": "clip.wav", "question": "...", "choices": ["...", "..."], "answer": "..."}   as in MMAU
    perplexity  {"text": "..."}, with or without "audio"

A manifest is a JSON list or JSON lines. Audio is in the folder of the manifest or below it. Manifests are untrusted, so
names that lead out of that folder are refused.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from ...kernels.errors import AfnextError

Task = Literal["asr", "choice", "perplexity"]
TASKS: tuple[Task, ...] = ("asr", "choice", "perplexity")
GROUPS = ("task", "category", "difficulty")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAX_MANIFEST_BYTES = 512 * 2**20
_AUDIO_KEYS = ("audio", "audio_filepath", "audio_id", "audio_path")


class ManifestError(AfnextError):
    """A manifest cannot be read, or names a file outside its folder."""


@dataclass(frozen=True)
class Item:
    """One row of a manifest. number: counted from 1; text: the reference or, for multiple choice, the right choice's
    text; groups: those of `GROUPS` that the row names; more_audio: recordings that follow `audio`."""

    number: int
    id: str
    audio: Path | None
    audio_name: str
    text: str
    question: str = ""
    choices: tuple[str, ...] = ()
    groups: dict[str, str] = field(default_factory=dict)
    more_audio: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Items:
    """Rows to be scored. fingerprint: a hash of their contents; left_out: rows of the source that are not scored."""

    items: list[Item]
    fingerprint: str
    left_out: int = 0


@dataclass(frozen=True)
class Manifest:
    """The rows of a manifest. fingerprint: a hash of the file."""

    path: Path
    task: Task
    items: list[Item]
    fingerprint: str


def read_manifest(data: Path, task: Task | Literal["auto"] = "auto") -> Manifest:
    """Read the manifest `data`, or the only .json or .jsonl file in the folder `data`.

    task: "auto" derives it from the first row. Raises ManifestError naming the wrong row.
    """
    path = _manifest_path(data)
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ManifestError(f"{path} has more than {_MAX_MANIFEST_BYTES} bytes; split it into several manifests")
    content = path.read_bytes()
    rows = parse_rows(content, path)
    kind = _guess(rows[0], path) if task == "auto" else task
    if kind not in TASKS:
        raise ManifestError(f"there is no task {kind!r}; choose auto, {', '.join(TASKS)}")
    items = [_item(row, number, kind, path) for number, row in enumerate(rows, start=1)]
    return Manifest(path, kind, items, hashlib.sha256(content).hexdigest()[:16])


def _manifest_path(data: Path) -> Path:
    if not data.is_dir():
        if not data.is_file():
            raise ManifestError(f"there is no manifest or folder at {data}")
        return data
    found = sorted(path for path in data.iterdir() if path.suffix in (".json", ".jsonl") and path.is_file())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ManifestError(f"{data} should hold one .json or .jsonl manifest and has {names}; name the file to use")
    return found[0]


def parse_rows(content: bytes, path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines. Raises ManifestError, also if there is none."""
    try:
        text = content.decode("utf-8-sig")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is neither a JSON list nor JSON lines: {error}") from None
    if not rows:
        raise ManifestError(f"{path} is empty")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ManifestError(f"{path}, row {number}: expected an object, found a {type(row).__name__}")
    return list(rows)


def _guess(row: dict[str, Any], path: Path) -> Task:
    if "choices" in row:
        return "choice"
    if "text" in row:
        return "asr" if any(key in row for key in _AUDIO_KEYS) else "perplexity"
    raise ManifestError(f"{path}, row 1, has neither text nor choices, so it is no manifest that this benchmark knows")


def _item(row: dict[str, Any], number: int, task: Task, path: Path) -> Item:
    where = f"{path}, row {number}"
    name = next((row[key] for key in _AUDIO_KEYS if row.get(key) is not None), None)
    if name is None and task != "perplexity":
        raise ManifestError(f"{where}: no audio; name a file under one of {', '.join(_AUDIO_KEYS)}")
    if row.get("offset"):
        raise ManifestError(f"{where}: offset is not supported, since the whole file is heard; cut the audio first")
    audio = None if name is None else inside(path.parent, name, where)
    groups = {group: _unicode(str(row[group]), group, where) for group in GROUPS if row.get(group) is not None}
    item_id, audio_name = _unicode(str(row.get("id", number)), "id", where), str(name or "")
    if task != "choice":
        text = string(row, "text", where)
        return Item(number, item_id, audio, audio_name, text, groups=groups)
    choices = _choices(row, where)
    answer = string(row, "answer", where)
    right = match_choice(answer, choices)
    if right is None:
        raise ManifestError(f"{where}: the answer {answer!r} is not one of its choices")
    return Item(number, item_id, audio, audio_name, choices[right], string(row, "question", where), choices, groups)


def string(row: Mapping[str, Any], key: str, where: str) -> str:
    """A field that must be a string of valid Unicode. Raises ManifestError."""
    value = row.get(key)
    if not isinstance(value, str):
        raise ManifestError(f"{where}: {key} should be a string and is {value!r:.60}")
    return _unicode(value, key, where)


def _unicode(value: str, key: str, where: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ManifestError(f"{where}: {key} holds a lone surrogate, which is not valid Unicode")
    return value


def _choices(row: dict[str, Any], where: str) -> tuple[str, ...]:
    choices = row.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ManifestError(f"{where}: choices should be a list of 2 to {len(LETTERS)} strings")
    return tuple(string({"choices": choice}, "choices", where) for choice in choices)


def inside(folder: Path, name: Any, where: str) -> Path:
    """The file `name` of a manifest, which must lie in `folder` or below, symbolic links followed.

    Raises ManifestError for an absolute name, `..`, a link that leads out, or anything but a string.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ManifestError(f"{where}: {name!r:.60} is no name of an audio file")
    _unicode(name, "audio", where)
    windows = PureWindowsPath(name)  # splits at both kinds of slashes and knows drives
    if name.startswith(("/", "\\")) or windows.drive or ".." in windows.parts:
        raise ManifestError(f"{where}: {name!r:.200} leads out of the data folder; use names relative to {folder}")
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ManifestError(f"{where}: {name!r:.200} cannot be a file ({error})") from None
    if not path.is_relative_to(folder.resolve()):
        raise ManifestError(f"{where}: {name!r:.200} is a link that leads out of {folder}; copy the file there")
    return path


def normalise(text: str) -> str:
    """The text normalised for comparing words: NFKC, lower case, without apostrophes, other punctuation and symbols as
    spaces, one space between words. Numbers and spelling are unchanged ("20" is not "twenty")."""
    folded = unicodedata.normalize("NFKC", text).lower().replace("’", "").replace("'", "")
    spaced = (" " if unicodedata.category(character)[0] in "PS" else character for character in folded)
    return " ".join("".join(spaced).split())


def choice_prompt(question: str, choices: tuple[str, ...]) -> str:
    """The question with its choices lettered (A), (B), ... one per line."""
    lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, "Choose the correct option from the following options:", *lines])


def match_choice(answer: str, choices: tuple[str, ...]) -> int | None:
    """Index of the choice that `answer` names, by letter, by text or by both; None if it is ambiguous.

    Letters count as "(B)", as "B", "B." or "B: text" at the start, and after "answer", "option" or "choice". The text
    counts if the answer has no other choice's text, except inside it. A letter that contradicts the text is ambiguous.
    """
    said, *texts = (normalise(text) or text.strip() for text in (answer, *choices))  # "+" and "-" may be choices
    if said in texts:
        return texts.index(said)
    letter, text = _by_letter(answer, len(choices)), _by_text(said, texts)
    if letter is not None and text is not None and texts[letter] != texts[text]:
        return None
    return text if letter is None else letter


def _by_letter(answer: str, count: int) -> int | None:
    letters = LETTERS[:count]
    patterns = (
        rf"\(([{letters}{letters.lower()}])\)",
        rf"^\W*([{letters}{letters.lower()}])(?:\W*$|[.):])",
        rf"\b(?i:answer|option|choice)(?: is)?\W+([{letters}])\b(?! \w)",
    )
    for pattern in patterns:
        found = set(map(str.upper, re.findall(pattern, answer)))
        if found:
            return letters.index(found.pop()) if len(found) == 1 else None
    return None


def _by_text(answer: str, texts: list[str]) -> int | None:
    found = {text for text in texts if text and f" {text} " in f" {answer} "}
    longest = {text for text in found if not any(text != other and f" {text} " in f" {other} " for other in found)}
    return texts.index(longest.pop()) if len(longest) == 1 else None
