"""Compares two files of results: which measurements became faster or slower beyond their spread.

A pair is flagged when the spreads, the 20th to the 80th percentile, do not overlap. Differences between the machines
come first: across machines a ratio says nothing about the code.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..core.record import Record
from . import labels

Verdict = Literal["better", "worse", "within spread", "equal", "no spread", "outputs disagree"]
# What is compared, the first that both have; -1 where less is better. Spreads: see `_spread`.
METRICS = {
    "median_s": -1,
    "tokens_per_s": 1,
    "wer": -1,
    "accuracy": 1,
    "perplexity": -1,
    "copy_bytes_per_s": 1,
    "peak_device_bytes": -1,
    "peak_rss_bytes": -1,
}
# These change between two runs on one machine; all other fields make it another one.
_CHANGING = ("timestamp", "commit", "dirty", "gpu.sm_mhz", "gpu.memory_mhz")
_STYLES = {"better": "green", "worse": "red", "outputs disagree": "bold red"}


@dataclass(frozen=True)
class Row:
    """One pair. metric: what is compared; ratio: b / a, None when a is 0; spread_*: 20th and 80th percentile, or None
    where the record has none."""

    bench: str
    name: str
    subject: str
    case: dict[str, Any]
    kind: str
    metric: str
    a: float
    b: float
    ratio: float | None
    spread_a: tuple[float, float] | None
    spread_b: tuple[float, float] | None
    verdict: Verdict

    @property
    def flagged(self) -> bool:
        """Whether the difference is beyond the spreads, or the outputs no longer agree."""
        return self.verdict in _STYLES


@dataclass(frozen=True)
class Difference:
    """A field of the machine, such as "gpu.name" or "versions.torch", with its values in each file."""

    field: str
    a: list[str]
    b: list[str]


@dataclass(frozen=True)
class Comparison:
    """machines: fields that differ, those that make it another machine first; other_machine: whether there are such
    fields; only_in_a, only_in_b: labels of what has no counterpart; repeated: how many older measurements of the same
    thing were passed over for the latest in their file."""

    machines: list[Difference]
    other_machine: bool
    rows: list[Row]
    only_in_a: list[str]
    only_in_b: list[str]
    repeated: int


def compare(a: Path, b: Path) -> Comparison:
    """Pair the records of two files by measurement, whatever the machine.

    Raises ResultsError when a file is missing or damaged.
    """
    records_a, records_b = labels.records(a), labels.records(b)
    by_key_a = {record.key: record for record in records_a}
    by_key_b = {record.key: record for record in records_b}
    machines, other = _differences(records_a, records_b)
    pairs = [(one, by_key_b[key]) for key, one in by_key_a.items() if key in by_key_b]
    return Comparison(
        machines=machines,
        other_machine=other,
        rows=[row for pair in pairs if (row := _row(*pair)) is not None],
        only_in_a=[_label(record) for key, record in by_key_a.items() if key not in by_key_b],
        only_in_b=[_label(record) for key, record in by_key_b.items() if key not in by_key_a],
        repeated=len(records_a) + len(records_b) - len(by_key_a) - len(by_key_b),
    )


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values, ready for JSON."""
    rows = [{**asdict(row), "flagged": row.flagged} for row in comparison.rows]
    return {**asdict(comparison), "rows": rows}


def render(comparison: Comparison) -> RenderableType:
    """The comparison for a terminal: machines first, then the pairs, then records without a pair."""
    parts: list[RenderableType] = []
    if comparison.other_machine:
        text = "A and B were measured on different machines: the ratios below compare machines, too."
        parts.append(Panel(Text(text, style="bold red"), border_style="red", title="different machines"))
    if comparison.machines:
        parts.append(_machines_table(comparison.machines))
    parts.append(_rows_table(comparison.rows) if comparison.rows else Text("Nothing was measured in both."))
    for name, only in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        if only:
            parts.append(Text(f"only in {name}:", style="bold"))
            parts += [Text(f"  {label}") for label in only]
    if comparison.repeated:
        parts.append(Text(f"{comparison.repeated} older measurements of the same things were passed over.", "dim"))
    return Group(*parts)


def _row(a: Record, b: Record) -> Row | None:
    """None when the two have no metric in common."""
    for metric, sign in METRICS.items():
        value_a, value_b = labels.number(a.values.get(metric)), labels.number(b.values.get(metric))
        if value_a is None or value_b is None:
            continue
        spread_a, spread_b = _spread(a, metric), _spread(b, metric)
        broken = b.values.get("agrees") is False and a.values.get("agrees") is not False
        verdict = "outputs disagree" if broken else _verdict(sign * (value_b - value_a), spread_a, spread_b)
        ratio = value_b / value_a if value_a else None
        return Row(
            *(a.bench, a.name, a.subject, a.case, a.kind, metric, value_a, value_b, ratio, spread_a, spread_b),
            verdict=verdict,
        )
    return None


def _spread(record: Record, metric: str) -> tuple[float, float] | None:
    names = ("p20_s", "p80_s") if metric == "median_s" else (f"{metric}_low", f"{metric}_high")
    low, high = (labels.number(record.values.get(name)) for name in names)
    return None if low is None or high is None else (low, high)


def _verdict(gain: float, a: tuple[float, float] | None, b: tuple[float, float] | None) -> Verdict:
    if a is None or b is None:
        return "equal" if gain == 0 else "no spread"
    if a[0] <= b[1] and b[0] <= a[1]:
        return "within spread"
    return "better" if gain > 0 else "worse"


def _differences(a: list[Record], b: list[Record]) -> tuple[list[Difference], bool]:
    fields_a, fields_b = _fields(a), _fields(b)
    differing = [
        Difference(name, sorted(fields_a.get(name, ())), sorted(fields_b.get(name, ())))
        for name in dict.fromkeys((*fields_a, *fields_b))
        if fields_a.get(name) != fields_b.get(name) or (len(fields_a[name]) > 1 and not _changes(name))
    ]
    differing.sort(key=lambda difference: _changes(difference.field))
    return differing, any(not _changes(difference.field) for difference in differing)


def _fields(records: list[Record]) -> dict[str, set[str]]:
    """Every field of the machines and its values. A projection has no machine and says nothing."""
    fields: dict[str, set[str]] = {}
    for record in records:
        for name, value in labels.flatten(record.machine).items():
            if name != "timestamp":
                fields.setdefault(labels.clean(name), set()).add(labels.clean(value))
    return fields


def _changes(name: str) -> bool:
    return name in _CHANGING or name.startswith("versions.")


def _label(record: Record) -> str:
    words = (record.bench, record.name, record.subject, labels.case_label(record.case), record.kind)
    return " · ".join(filter(None, map(labels.clean, words)))


def _machines_table(differences: list[Difference]) -> Table:
    table = Table("machine", "A", "B", title="differences between the machines", title_justify="left")
    for difference in differences:
        sides = (" / ".join(side) or "absent" for side in (difference.a, difference.b))
        style = "" if _changes(difference.field) else "bold red"
        table.add_row(*(Text(text, style) for text in (difference.field, *sides)))
    return table


def _rows_table(rows: list[Row]) -> Table:
    table = Table("what", "case", "subject", "kind", title="B against A", title_justify="left")
    for column in ("A", "B", "B / A"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for row in rows:
        what = f"{row.bench} {row.name}" if row.metric == "median_s" else f"{row.bench} {row.name}, {row.metric}"
        texts = map(labels.clean, (what, labels.case_label(row.case), row.subject, row.kind))
        figures = (_figure(row.metric, row.a), _figure(row.metric, row.b))
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        cells = (*texts, *figures, ratio, row.verdict)
        table.add_row(*(Text(cell, _STYLES.get(row.verdict, "")) for cell in cells))
    return table


def _figure(metric: str, value: float) -> str:
    if metric == "median_s":
        return labels.seconds(value)
    return labels.size(value) if metric.startswith("peak_") else labels.digits(value)
