"""The tables of docs/performance.md, from files of results, between markers that name the file:

    <!-- results: layers_zen5.jsonl -->     or, for the records of one bench: <!-- results: results.jsonl e2e -->
    <!-- end of results -->

What lies between them is replaced: the machine with its versions, then a table with one row per case and one column per
subject.
"""

import html
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.record import Record, ResultsError
from . import labels

_BLOCK = re.compile(
    r"(?P<start><!-- results: (?P<file>[\w.-]+\.jsonl)(?: (?P<bench>[\w-]+))? -->\n)"
    r".*?(?P<end><!-- end of results -->)",
    re.DOTALL,
)
_ISA = {"avx512_bf16": "AVX512-BF16", "avx512_vnni": "AVX512-VNNI", "amx_bf16": "AMX", "avx2": "AVX2"}

Figure = Callable[[Any], str]


def _percent(value: Any) -> str:
    return f"{labels.digits(value)} %" if labels.number(value) is not None else ""


# Rows below that of the times, by bench: the key in the values, the name of the row, and how the figure is written.
_FURTHER: dict[str, dict[str, tuple[str, Figure]]] = {
    "layers": {"percent_of_read": ("share of read bandwidth", _percent)},
    "llama-cpp": {"tokens_per_s": ("tokens per second", labels.digits)},
    "e2e": {
        "tokens_per_s": ("tokens per second", labels.digits),
        "percent_of_copy": ("share of copy bandwidth", _percent),
        "resident_bytes": ("resident memory", labels.size),
    },
}


def update(page: Path, results: Path) -> bool:
    """Fill the marked parts of `page` from the files in the folder `results`. Returns whether the page changed.

    Raises ResultsError if the page has no marked part, or a file of results is missing, damaged or has no record of the
    bench named.
    """
    before = page.read_text(encoding="utf-8")
    after = filled(before, results)
    if after == before:
        return False
    page.write_text(after, encoding="utf-8")
    return True


def filled(text: str, results: Path) -> str:
    """The text with its marked parts filled from the folder `results`. Raises ResultsError as `update` does."""

    def replacement(block: re.Match[str]) -> str:
        records = labels.records(results / block["file"])
        chosen = [record for record in records if block["bench"] in (None, record.bench)]
        if not chosen:
            raise ResultsError(f"{results / block['file']} holds no results of {block['bench'] or 'any bench'}")
        return f"{block['start']}{section(chosen)}\n{block['end']}"

    after, count = _BLOCK.subn(replacement, text)
    if not count:
        raise ResultsError("the page has no part between <!-- results: FILE.jsonl --> and <!-- end of results -->")
    return after


def section(records: list[Record]) -> str:
    """Markdown about records of one machine: a line about it, the table, and a line for each note and warning."""
    timed = [record for record in records if record.bench in _FURTHER]
    parts = [_machine(records)]
    if timed:
        parts.append(_times(timed))
    if others := [record for record in records if record.bench not in _FURTHER]:
        parts.append(_values(others))
    notes = dict.fromkeys(_text(record.values["note"]) for record in records if record.values.get("note"))
    parts += [f"{note[:1].upper()}{note[1:]}." for note in notes]
    parts += [
        f"Warning: {_text(record.subject)}, {_row(record)}: {_text(record.values['warning'])}."
        for record in records
        if record.values.get("warning")
    ]
    return "\n\n".join(parts)


def _machine(records: list[Record]) -> str:
    """The machines of the records with their versions, and when and at which commits they measured."""
    machines = {labels.machine_label(record.machine): record.machine for record in records}
    parts = [_described(name, machine) for name, machine in machines.items()]
    dates = sorted({_text(record.machine.get("timestamp", ""))[:10] for record in records})
    commits = dict.fromkeys(_text(record.machine.get("commit", ""))[:7] for record in records)
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(parts)}. Measured {when} at {', '.join(commits)}."


def _described(name: str, machine: Mapping[str, Any]) -> str:
    versions = machine.get("versions") or {}
    isa = [title for key, title in _ISA.items() if key in machine.get("isa", ())]
    parts = [
        name or "unknown machine",
        f"{labels.digits(machine.get('threads'))} threads",
        f"{labels.size(machine.get('memory_bytes'))} of memory",
        " and ".join(isa if len(isa) < 2 else [title for title in isa if title != "AVX2"]),
        *(f"{library} {versions[library]}" for library in ("torch", "transformers") if library in versions),
    ]
    return _text(", ".join(part for part in parts if part))


def _times(records: list[Record]) -> str:
    subjects = list(dict.fromkeys(record.subject for record in records))
    subjects.sort(key=lambda subject: subject.startswith("afnext"))  # what is compared with comes first
    rows: dict[tuple[str, str], dict[str, str]] = {}  # by the case, and the title of a further row
    for record in records:
        name = _row(record)
        rows.setdefault((name, ""), {})[record.subject] = _time(record.values)
        for key, (title, figure) in _FURTHER[record.bench].items():
            if shown := figure(record.values.get(key)):
                rows.setdefault((name, title), {})[record.subject] = shown
    lines = [["", *map(_text, subjects)], ["---", *["---:"] * len(subjects)]]
    for (name, title), cells in rows.items():
        lines.append([f"– {title}" if title else name, *(cells.get(subject, "") for subject in subjects)])
    return _table(lines)


def _row(record: Record) -> str:
    case = record.case
    if record.bench == "e2e":
        label = f"{record.name}, {labels.digits(case.get('audio_seconds'))} s of audio"
        shape = f"{'+'.join(map(str, case.get('layers') or []))} layers"
    else:
        label, shape = f"{record.name}, {case.get('label', '')}", case.get("model", "")
    kind = "" if record.kind == "measured" else f", {record.kind}"
    return _text(f"{label} ({shape}{kind})")


def _time(values: Mapping[str, Any]) -> str:
    """The median, and the speedup unless the outputs were found to differ."""
    factor = labels.positive(values.get("speedup"))
    differs = values.get("agrees") is False or values.get("reason")
    return labels.seconds(values.get("median_s")) + (f", {factor:.2f}x" if factor and not differs else "")


def _values(records: list[Record]) -> str:
    """One row per record with every figure that it holds."""
    lines = [["", "figures"], ["---", "---"]]
    for record in records:
        figures = [_named(key, value) for key, value in labels.flatten(record.values).items()]
        lines.append([_text(f"{record.name} ({labels.case_label(record.case)})".replace("_", " ")), "; ".join(figures)])
    return _table(lines)


def _named(key: str, value: Any) -> str:
    """A value with its name in words; sizes and times with their unit."""
    name, shown = key, labels.digits(value) or labels.clean(value)
    if key.endswith("_bytes"):
        name, shown = key.removesuffix("_bytes"), labels.size(value)
    elif key.endswith("_s") and not key.endswith("_per_s"):
        name, shown = key.removesuffix("_s"), labels.seconds(value)
    return _text(f"{name.replace('_', ' ')} {shown}")


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    """The value as text without markup: no table cells, no HTML, no links."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(labels.clean(value), quote=False))
