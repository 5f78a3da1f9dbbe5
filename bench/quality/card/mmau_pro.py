"""MMAU-Pro: 5305 questions about speech, sound, music and their mixtures, of one recording or several.

    test.parquet beside data/, unpacked from its data.zip

A row has id, audio_path (a list of names), question, choices, answer, category, and for category "instruction
following" task_identifier and kwargs. Three kinds, by category: "open" (a reference answer), "instruction following"
(a rule that the answer must follow, see `instructions`), and all others, which are multiple choice.

Source: Kumar et al. 2025, arXiv:2508.13992.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..data import Item, Items, ManifestError, string
from .instructions import RULES
from .rows import Recordings, Row, items_of, parquet_rows

OPEN, INSTRUCTION = "open", "instruction following"


@dataclass(frozen=True)
class InstructionItem(Item):
    """A question whose answer must follow a rule. rule: a key of `RULES`; values: the rule's arguments."""

    rule: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def local(folder: Path, unpacked: Path) -> Items:
    """The questions in a copy of the repository, whose data.zip is unpacked in place."""
    path = folder / "test.parquet"
    if not path.is_file():
        raise ManifestError(f"{folder} has no test.parquet; name a copy of the dataset")
    return from_rows(parquet_rows([path]), Recordings(folder, unpacked))


def from_rows(rows: Iterable[Row], recordings: Recordings) -> Items:
    """The questions of a table, without multiple-choice ones with fewer than two choices, as in its own script."""
    return items_of(rows, partial(_item, recordings))


def _item(recordings: Recordings, row: Row, number: int, where: str) -> Item | None:
    category = str(row.get("category"))
    choices = tuple(str(choice) for choice in row.get("choices") or ())
    if category not in (OPEN, INSTRUCTION) and len(choices) < 2:
        return None
    names = row.get("audio_path")
    if isinstance(names, str):
        names = [names]
    if not names:
        raise ManifestError(f"{where}: audio_path names no recording")
    audio, *more = (recordings.of(name, number, where) for name in names)
    question, groups = string(row, "question", where), {"category": category}
    base = (number, str(row.get("id", number)), audio, ", ".join(map(str, names)))
    if category == INSTRUCTION:
        rule, values = str(row.get("task_identifier")), _values(row.get("kwargs"), where)
        if rule not in RULES:
            raise ManifestError(f"{where}: there is no instruction {rule!r:.60}; there are {', '.join(RULES)}")
        return InstructionItem(*base, "", question, (), groups, tuple(more), rule, {**values, "prompt": question})
    shown = () if category == OPEN else choices
    return Item(*base, string(row, "answer", where), question, shown, groups, tuple(more))


def _values(kwargs: Any, where: str) -> dict[str, Any]:
    """The arguments of a rule, without fields that only other rows have."""
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except ValueError:
            raise ManifestError(f"{where}: kwargs is not JSON") from None
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ManifestError(f"{where}: kwargs should be an object and is {kwargs!r:.60}")
    return {name: value for name, value in (kwargs or {}).items() if value is not None}
