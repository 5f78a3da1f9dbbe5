"""One page of results, as HTML in a single file and as Markdown with its plots beside it.

Everything that a record says is text: escaped in both, and nothing is fetched from anywhere. Measured, extrapolated and
projected figures carry their kind, and a speedup is given only where the outputs were compared and agreed.
"""

import base64
import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.record import Record, ResultsError
from . import labels, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND_NOTE = (
    "Measured: taken on the machine named. Extrapolated: measured with fewer layers and multiplied. Projected: "
    "computed from a roofline, not run at all."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; } img { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .25rem .6rem; text-align: left; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; } td.figure { text-align: right; }
tr.extrapolated, tr.projected { font-style: italic; background: #f6f2e8; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Table:
    """rows: cells as plain text; kinds: the kind of each row, "" where it has none. Columns from the one called "kind"
    on hold figures."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    kinds: list[str]

    @property
    def text_columns(self) -> int:
        """Number of text columns at the left."""
        return self.columns.index("kind") + 1 if "kind" in self.columns else len(self.columns)

    def without_empty_columns(self) -> "Table":
        """The table without columns that no row fills."""
        keep = [i for i in range(len(self.columns)) if any(row[i] for row in self.rows)]
        rows = [tuple(row[i] for i in keep) for row in self.rows]
        return Table(tuple(self.columns[i] for i in keep), rows, self.kinds)


@dataclass(frozen=True)
class Section:
    """A heading with a paragraph, a plot under its file name, and tables; each may be absent."""

    title: str
    text: str = ""
    plot: tuple[str, bytes] | None = None
    tables: list[Table] = field(default_factory=list)


def write_report(results: list[Path], out: Path) -> tuple[Path, Path]:
    """Write `report.html` (self-contained), `report.md` and its PNG files into the folder `out`; return the two pages.

    results: files of JSON lines, or folders of them. The latest of several measurements of one thing on one machine
    counts. Raises ResultsError when there is nothing to show or a file is damaged, AfnextError without matplotlib.
    """
    records = [record for path in results for file in _files(path) for record in labels.records(file)]
    if not records:
        raise ResultsError(f"{', '.join(map(str, results)) or 'no file'}: there are no results to report")
    if out.exists() and not out.is_dir():
        raise ResultsError(f"{out} is a file; name a folder for the report")
    latest = list({(record.key, labels.machine_label(record.machine)): record for record in records}.values())
    sections = [*_sections(latest, passed_over=len(records) - len(latest)), _gpu_section(latest), *_history(records)]
    out.mkdir(parents=True, exist_ok=True)
    for section in sections:
        if section.plot is not None:
            (out / section.plot[0]).write_bytes(section.plot[1])
    page, text = out / "report.html", out / "report.md"
    page.write_text(_html(sections), encoding="utf-8")
    text.write_text(_markdown(sections), encoding="utf-8")
    return page, text


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.jsonl")) if path.is_dir() else [path]


def _sections(records: list[Record], passed_over: int) -> list[Section]:
    records = sorted(records, key=lambda record: labels.KINDS.index(record.kind))
    note = f"{passed_over} older measurements of the same things were passed over. " if passed_over else ""
    ceilings = [record for record in records if record.name == "ceiling"]
    by_bench: dict[str, list[Record]] = {"e2e": [], "kernels": [], "quality": [], "": []}
    for record in records:
        if record.name != "ceiling":
            by_bench[record.bench if record.bench in by_bench else ""].append(record)
    candidates = [
        Section("Machines", note + KIND_NOTE, tables=[_machine_table(records)]),
        Section(
            "Where the time goes",
            "Seconds of each stage of a request. Hatched bars were not measured. In the table, decode is one step.",
            _plot("stages.png", plots.stage_breakdown(records)),
            [_e2e_table(by_bench["e2e"])],
        ),
        Section(
            "Speed against the reference",
            "Only where the outputs were compared and agreed; the last column of the tables says why one is missing.",
            _plot("speedup.png", plots.speedup(by_bench["e2e"], "the reference")),
        ),
        Section(
            "Decoding by the length of the context",
            "Tokens a second, all sequences of a batch together.",
            _plot("tokens.png", plots.tokens_by_context(records)),
        ),
        Section(
            "Memory by the length of the audio",
            "The most that was held at once: on the device, by the process, and by it beyond what it held before.",
            _plot("memory.png", plots.memory_by_audio(records)),
        ),
        Section(
            "Kernels on the roofline",
            "Each kernel as measured, under the ceilings of its machine. Projections lie on a roof and are left out.",
            _plot("roofline.png", plots.roofline(records)),
            [_kernel_table(by_bench["kernels"]), _value_table(ceilings)],
        ),
        Section(
            "Kernels against the baseline",
            "Only where the outputs were compared and agreed; the last column of the table says why one is missing.",
            _plot("kernels.png", plots.speedup(by_bench["kernels"], "torch")),
        ),
        Section("Quality", tables=[_value_table(by_bench["quality"])]),
        Section("Other results", tables=[_value_table(by_bench[""])]),
    ]
    return [section for section in candidates if section.plot or any(table.rows for table in section.tables)]


def _gpu_section(records: list[Record]) -> Section:
    """Which GPUs the results are from, or that there are none from any."""
    counts: dict[str, int] = {}
    for record in records:
        gpu = record.machine.get("gpu")
        if isinstance(gpu, dict) and record.kind == "measured":
            name = labels.clean(gpu.get("name"))
            counts[name] = counts.get(name, 0) + 1
    if not counts:
        return Section(
            "On GPUs",
            "Not yet run. `afnext bench first-run --device cuda` measures a GPU and packs an archive of results.",
        )
    rows: list[tuple[str, ...]] = [(name, str(count)) for name, count in sorted(counts.items())]
    return Section("On GPUs", tables=[Table(("GPU", "measurements"), rows, [""] * len(rows))])


def _history(records: list[Record]) -> list[Section]:
    """What was measured on one machine at several commits: the median time at each, the oldest first."""
    alike: dict[tuple[str, str], dict[str, Record]] = {}
    for record in sorted(records, key=lambda record: str(record.machine.get("timestamp"))):
        commit = record.machine.get("commit")
        if isinstance(commit, str) and labels.number(record.values.get("median_s")) is not None:
            alike.setdefault((record.key, labels.machine_label(record.machine)), {})[commit] = record
    rows: list[tuple[str, ...]] = []
    for (_, machine), by_commit in alike.items():
        first = next(iter(by_commit.values()))
        for commit, record in by_commit.items() if len(by_commit) > 1 else ():
            change = record.values["median_s"] / first.values["median_s"] if first.values["median_s"] else 0.0
            times = labels.seconds(record.values["median_s"]), f"{change:.2f}×"
            what = labels.clean(record.name), labels.case_label(record.case), labels.clean(record.subject), machine
            day = labels.clean(str(record.machine.get("timestamp"))[:10])
            rows.append((*what, labels.clean(commit[:10]), day, record.kind, *times))
    if not rows:
        return []
    columns = ("what", "case", "subject", "machine", "commit", "day", "kind", "median", "of the first")
    text = "The same measurement on the same machine at several commits."
    return [Section("History", text, tables=[Table(columns, rows, [row[6] for row in rows])])]


def _plot(name: str, figure: "Figure | None") -> tuple[str, bytes] | None:
    return None if figure is None else (name, plots.png(figure))


def _machine_table(records: list[Record]) -> Table:
    """One column a machine, one row a field; where a machine's field changed between records, all of its values."""
    machines: dict[str, dict[str, list[str]]] = {}
    for record in records:
        label = labels.machine_label(record.machine)
        for key, value in labels.flatten(record.machine).items() if label else ():
            shown = labels.size(value) if key.endswith("_bytes") else labels.clean(value)
            seen = machines.setdefault(label, {}).setdefault(labels.clean(key), [])
            if shown not in seen:
                seen.append(shown)
    fields = dict.fromkeys(key for machine in machines.values() for key in machine)
    rows = [(key, *(_several(machine.get(key, [])) for machine in machines.values())) for key in fields]
    return Table(("", *machines), rows, [""] * len(rows))


def _several(values: list[str]) -> str:
    ordered = sorted(values)
    return "; ".join(ordered) if len(ordered) <= 3 else f"{ordered[0]} … {ordered[-1]} ({len(ordered)} values)"


Column = Callable[[dict[str, Any]], str]


def _bytes(key: str) -> Column:
    return lambda values: labels.size(values.get(key))


_TIMES: dict[str, Column] = {
    "median": lambda values: labels.seconds(values.get("median_s")),
    "p20 – p80": lambda values: _range(values.get("p20_s"), values.get("p80_s")),
}
_E2E: dict[str, Column] = {
    **_TIMES,
    "tokens/s": lambda values: labels.digits(values.get("tokens_per_s")),
    "windows/s": lambda values: labels.digits(values.get("windows_per_s")),
    "real-time factor": lambda values: labels.digits(values.get("real_time_factor")),
    **{title: _bytes(key) for key, title in plots.MEMORY.items()},
}
_KERNELS: dict[str, Column] = {
    **_TIMES,
    "TFLOP/s": lambda values: labels.digits(values.get("tflops_per_s")),
    "GB/s": lambda values: labels.digits(values.get("gb_per_s")),
    "% of ceiling": lambda values: labels.digits(values.get("percent_of_ceiling")),
}


def _e2e_table(records: list[Record]) -> Table:
    return _table("stage", records, _E2E)


def _kernel_table(records: list[Record]) -> Table:
    return _table("operation", records, _KERNELS)


def _table(first: str, records: list[Record], figures: dict[str, Column]) -> Table:
    several = _machines(records)
    rows = [
        (*_identity(record, several), *(column(record.values) for column in figures.values()), _speedup(record))
        for record in records
    ]
    columns = (first, "case", "subject", "machine", "kind", *figures, "speedup")
    return Table(columns, rows, [record.kind for record in records]).without_empty_columns()


def _value_table(records: list[Record]) -> Table:
    """All values of records of any bench: one row per value."""
    rows, kinds, several = [], [], _machines(records)
    for record in records:
        for key, value in labels.flatten(record.values).items():
            shown = labels.clean(value) if labels.number(value) is None else labels.digits(value)
            rows.append((*_identity(record, several), labels.clean(key), shown))
            kinds.append(record.kind)
    return Table(("what", "case", "subject", "machine", "kind", "value", "figure"), rows, kinds).without_empty_columns()


def _machines(records: list[Record]) -> bool:
    """Whether the records come from several machines, so that each row must name its machine."""
    return len({labels.machine_label(record.machine) for record in records}) > 1


def _identity(record: Record, several: bool) -> tuple[str, ...]:
    machine = labels.machine_label(record.machine) or "none" if several else ""
    subject = labels.clean(record.subject)
    return labels.clean(record.name), labels.case_label(record.case), subject, machine, record.kind


def _range(low: Any, high: Any) -> str:
    bounds = labels.seconds(low), labels.seconds(high)
    return " – ".join(bounds) if all(bounds) else ""


def _speedup(record: Record) -> str:
    """The speedup, or the reason that there is none."""
    factor, values = plots.agreed_speedup(record), record.values
    if factor is not None:
        return f"{factor:.3g}×"
    reason = labels.clean(values.get("reason") or values.get("no_speedup") or "")
    if values.get("agrees") is False:
        return f"none: the outputs disagree{f' ({reason})' if reason else ''}"
    if values.get("speedup") is not None and not reason:
        return "none: the outputs were not compared"
    return f"none: {reason}" if reason else ""


def _html(sections: list[Section]) -> str:
    body = ["<h1>afnext bench</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            body.append(f"<p>{html.escape(section.text)}</p>")
        if section.plot is not None:
            data = base64.b64encode(section.plot[1]).decode("ascii")
            body.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
        body += [_html_table(table) for table in section.tables if table.rows]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>afnext bench</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = []
    for row, kind in zip(table.rows, table.kinds, strict=True):
        classes = [""] * table.text_columns + [" class=figure"] * (len(row) - table.text_columns)
        cells = "".join(f"<td{style}>{html.escape(cell)}</td>" for style, cell in zip(classes, row, strict=True))
        rows.append(f'<tr class="{html.escape(kind)}">{cells}</tr>')
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _markdown(sections: list[Section]) -> str:
    parts = ["# afnext bench"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_plain(section.text)] if section.text else []
        parts += [f"![{section.title}]({section.plot[0]})"] if section.plot is not None else []
        parts += [_markdown_table(table) for table in section.tables if table.rows]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.columns, ("---",) * len(table.columns), *table.rows]
    cells = [[cell if cell == "---" and i == 1 else _plain(cell) for cell in line] for i, line in enumerate(lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _plain(text: str) -> str:
    """Text escaped for Markdown: no markup, no HTML, no links or pictures."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(text, quote=False)).replace("://", ":\u200b//")
