"""MMSU: 5000 multiple-choice questions about spoken language.

    local   data/*.parquet, or question/mmsu.jsonl (or mmsu.jsonl) and audio/
    hub     ddwang2000/MMSU, split train

A row has id, question, choice_a to choice_d, answer_gt (the text of the right choice), task_name, category and
sub-category, and its recording as `audio` (in the table) or `audio_path`. Choices may be numbers. Some questions have
fewer than four choices; the others are then empty.

Source: Wang et al. 2025, arXiv:2506.04779.
"""

from collections.abc import Iterable
from pathlib import Path

from ..data import Item, Items, ManifestError, string
from .rows import Recordings, Row, items_of, json_rows, parquet_rows

_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def local(folder: Path, unpacked: Path) -> Items:
    """The questions in a copy of the repository."""
    tables = sorted((folder / "data").glob("*.parquet"))
    if tables:
        return from_rows(parquet_rows(tables), Recordings(folder, unpacked))
    path = next((path for path in (folder / "question" / "mmsu.jsonl", folder / "mmsu.jsonl") if path.is_file()), None)
    if path is None:
        raise ManifestError(f"{folder} has neither data/*.parquet nor question/mmsu.jsonl; name a copy of the dataset")
    return from_rows(json_rows(path), Recordings(folder, unpacked))


def from_rows(rows: Iterable[Row], recordings: Recordings) -> Items:
    """The questions of a table or of JSON lines."""

    def item(row: Row, number: int, where: str) -> Item:
        choices = tuple(str(row[name]) for name in _CHOICES if row.get(name) not in (None, ""))
        answer = str(row.get("answer_gt"))
        if answer not in choices:
            raise ManifestError(f"{where}: the answer {answer!r:.100} is not one of its choices")
        value = row.get("audio") if row.get("audio") is not None else _named(row.get("audio_path"), recordings.folder)
        audio = recordings.of(value, number, where)
        groups = {"category": str(row.get("category", "")), "task": str(row.get("task_name", ""))}
        key, question = str(row.get("id", number)), string(row, "question", where)
        return Item(number, key, audio, audio.name, answer, question, choices, groups)

    return items_of(rows, item)


def _named(name: object, folder: Path) -> object:
    """`audio_path` as a name below the folder. For a path on the author's disk, only the last part is used."""
    if not isinstance(name, str) or (folder / name.lstrip("/")).is_file():
        return name
    return f"audio/{Path(name).name}"
