"""The plots of a report, each from a list of records; None if the records have no data for it.

Colours are Okabe and Ito's, told apart by the colour-blind. What was not measured never looks measured: extrapolated
bars are hatched and lines dashed, projected ones dotted.
"""

import io
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ...kernels.devices import find_device
from ...kernels.errors import AfnextError
from ..core.record import Record
from . import labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEMORY = {
    "peak_device_bytes": "device memory",
    "peak_rss_bytes": "process memory",
    "working_bytes": "working memory",
}
STAGES = ("load audio", "log-mel", "encode", "prefill", "decode")
BLUE, ORANGE, GREEN, SKY, VERMILION, PURPLE, GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#999999"),
)
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE)
_STAGE_COLOURS = dict(zip(STAGES, (SKY, ORANGE, GREEN, BLUE, VERMILION), strict=True))
_REST = "#DDDDDD"
_HATCHES = {"measured": "", "extrapolated": "////", "projected": "...."}
_LINES = {"measured": "-", "extrapolated": "--", "projected": ":"}
_MARKERS = "osD^vP*X"
_MOST = 48  # bars or lines in one plot; the tables hold the rest
_WIDTH = 9.0  # inches
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.8,
}

Bars = dict[tuple[str, str], dict[str, float]]  # by subject and kind: seconds by stage
Panels = dict[str, Bars]
Lines = dict[tuple[str, str], dict[float, float]]  # by subject and kind: y by x
P = ParamSpec("P")
T = TypeVar("T")


def _styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draws in the style of all plots. Text is plain: dollar signs in names are not formulas."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            import matplotlib
        except ImportError:
            raise AfnextError("plots need matplotlib: pip install matplotlib") from None
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def png(figure: "Figure") -> bytes:
    """The plot as a PNG of 150 dots an inch."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in another script; the tables have it in full
        figure.savefig(out, format="png", dpi=150, bbox_inches="tight", metadata={"Software": "afnext"})
    return out.getvalue()


@_styled
def stage_breakdown(records: list[Record]) -> "Figure | None":
    """The time of a request by stage: one stacked bar for each subject, one panel for each case. Seconds."""
    timed = [record for record in records if _is_stage(record)]
    several = len({labels.machine_label(record.machine) for record in timed}) > 1
    panels: Panels = {}
    for record in timed:
        panel = labels.case_label({key: record.case.get(key) for key in ("audio_seconds", "batch", "model", "layers")})
        panel += f" on {labels.machine_label(record.machine)}" if several else ""
        bar = panels.setdefault(panel, {}).setdefault((_subject(record), record.kind), {})
        bar[record.name] = _stage_seconds(record) or 0.0
    panels, note = _capped(panels)
    if not panels:
        return None
    heights = [0.9 + 0.42 * len(bars) for bars in panels.values()]
    figure = _figure(sum(heights) + 0.6)
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for row, (panel, bars) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[row])
        axes.set_title(labels.short(panel, 100), loc="left")
        _stacked_bars(axes, bars)
    axes.set_xlabel("seconds")
    shown = [stage for stage in STAGES if any(stage in bar for bars in panels.values() for bar in bars.values())]
    handles = [_patch(_STAGE_COLOURS[stage], stage) for stage in shown] + [_patch(_REST, "not broken down")]
    handles += _kind_patches(kind for bars in panels.values() for _, kind in bars)
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 7), frameon=False)
    _add_note(figure, note)
    return figure


def _is_stage(record: Record) -> bool:
    known = record.bench == "e2e" and record.name in (*STAGES, "total") and "audio_seconds" in record.case
    return known and _stage_seconds(record) is not None


def _stage_seconds(record: Record) -> float | None:
    """Seconds in a whole request. A record of decode is of one step, and `new_tokens` in its values or case says how
    many there were, the first being prefill's; without, its part of the request is not known."""
    median = labels.positive(record.values.get("median_s"))
    if record.name != "decode" or median is None:
        return median
    tokens = labels.positive(record.values.get("new_tokens", record.case.get("new_tokens")))
    return None if tokens is None or tokens < 2 else median * (tokens - 1)


def _stacked_bars(axes: "Axes", bars: Bars) -> None:
    totals = [max(each.get("total", 0.0), sum(each.get(stage, 0.0) for stage in STAGES)) for each in bars.values()]
    for y, ((_, kind), stages) in enumerate(bars.items()):
        left = 0.0
        pieces = [(stage, stages[stage], _STAGE_COLOURS[stage]) for stage in STAGES if stage in stages]
        rest = totals[y] - sum(length for _, length, _ in pieces)
        if rest > 0.005 * totals[y]:
            pieces.append(("", rest, _REST))
        for stage, length, colour in pieces:
            axes.barh(y, length, left=left, color=colour, hatch=_HATCHES[kind], edgecolor="white", linewidth=0.6)
            if stage and length > 0.085 * max(totals):
                box = {"facecolor": colour, "edgecolor": "none", "pad": 1.0}
                middle = left + length / 2
                axes.text(middle, y, labels.seconds(length), ha="center", va="center", color="white", bbox=box, size=8)
            left += length
        whole = stages.get("total", 0.0)
        ends = [f"{labels.seconds(left)} in stages"] if whole < 0.995 * left else []
        ends += [f"{labels.seconds(whole)} in all"] if whole else []
        axes.text(left, y, f"  {', '.join(ends)}", va="center", size=9)
    _bar_labels(axes, [subject if kind == "measured" else f"{subject}\n({kind})" for subject, kind in bars])
    axes.set_xlim(0, max(totals) * 1.36)
    axes.grid(axis="x", color="#E5E5E5")


@_styled
def speedup(records: list[Record], over: str) -> "Figure | None":
    """How many times as fast as `over`; only where the outputs agreed."""
    found = [record for record in records if agreed_speedup(record) is not None]
    shown = _of_each_name(_side_by_side(found))
    note = f"{_MOST} of {len(found)}, of each name in turn; the table has all" if len(found) > _MOST else ""
    if not shown:
        return None
    named, constant = _namer(shown), _constant(shown)
    subjects = list(dict.fromkeys(map(named, shown)))
    figure = _figure(1.4 + 0.3 * len(shown))
    axes = figure.add_subplot()
    for y, record in enumerate(shown):
        factor = agreed_speedup(record) or 1.0
        colour = PALETTE[subjects.index(named(record)) % len(PALETTE)]
        hatch = _HATCHES[record.kind]
        axes.barh(y, factor - 1, left=1, height=0.72, color=colour, hatch=hatch, edgecolor="white")
        axes.text(factor, y, f" {factor:.3g}× ", va="center", ha="left" if factor >= 1 else "right", size=9)
    without = ("scheme", "dtype", *constant)
    _bar_labels(axes, [" · ".join(filter(None, _what(record, without))) for record in shown], 56)
    factors = [1.0, *(agreed_speedup(record) or 1.0 for record in shown)]
    room = 1.25 * (max(factors) / min(factors)) ** 0.09
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(factors) / (room if min(factors) < 1 else 1.05), max(factors) * room)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}×")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel(f"speed relative to {over} (1× is as fast)")
    axes.grid(axis="x", color="#E5E5E5")
    handles = [_patch(PALETTE[i % len(PALETTE)], labels.short(s, 54)) for i, s in enumerate(subjects[: len(PALETTE)])]
    handles += _kind_patches(record.kind for record in shown)
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 2), frameon=False)
    shared = labels.case_label({key: shown[0].case.get(key) for key in constant if key != "scheme"})
    _add_note(figure, "; ".join(filter(None, (shared and f"all: {labels.short(shared, 90)}", note))))
    return figure


def _side_by_side(records: list[Record]) -> list[Record]:
    """The records grouped by stage and case, whatever the subject."""
    order: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        order.setdefault(_what(record, ("scheme", "dtype")), []).append(record)
    return [record for group in order.values() for record in group]


def _of_each_name(records: list[Record]) -> list[Record]:
    """At most _MOST of the records, in their order: the first of each name, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for index, record in enumerate(records):
        turns.append((seen[record.name], index))
        seen[record.name] += 1
    return [records[index] for index in sorted(index for _, index in sorted(turns)[:_MOST])]


def _what(record: Record, without: tuple[str, ...]) -> tuple[str, ...]:
    return labels.clean(record.name), labels.case_label(record.case, without)


def _constant(records: list[Record]) -> tuple[str, ...]:
    """The keys of the case with equal values in all records, if there are several records."""
    keys = dict.fromkeys(key for record in records for key in record.case) if len(records) > 1 else {}
    return tuple(key for key in keys if all(r.case.get(key) == records[0].case.get(key) for r in records))


def agreed_speedup(record: Record) -> float | None:
    """The speedup over the reference, or None when there is none or the outputs were not found to agree.

    Kernels say so by their `relative_error` and the absence of `no_speedup`, all others by `agrees`.
    """
    values = record.values
    compared = labels.number(values.get("relative_error")) is not None and "no_speedup" not in values
    agrees = values.get("agrees") is True or (compared and "agrees" not in values)
    return labels.positive(values.get("speedup")) if agrees else None


@_styled
def tokens_by_context(records: list[Record]) -> "Figure | None":
    """Decoding speed by the length of the context, `context` in case or values: tokens/s over the whole batch."""
    decoding = [record for record in records if record.bench == "e2e" and record.name == "decode"]
    lines = _lines(decoding, lambda r: (r.case.get("context", r.values.get("context")), r.values.get("tokens_per_s")))
    if not lines:
        return None
    figure = _figure(4.2)
    axes = figure.add_subplot()
    _draw_lines(axes, lines, list(lines))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("tokens/s")
    rates = [rate for points in lines.values() for rate in points.values()]
    if max(rates) > 20 * min(rates):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    else:
        axes.set_ylim(0, 1.12 * max(rates))
    _lines_legend(figure, [axes])
    _add_note(figure, _note(len(lines)))
    return figure


@_styled
def memory_by_audio(records: list[Record]) -> "Figure | None":
    """Largest memory by the length of the audio: of the device, of the process, and what the process needed beyond
    what it held before, as far as records have them. GB."""
    runs = [record for record in records if record.bench == "e2e"]
    panels: dict[str, Lines] = {}
    for key, what in MEMORY.items():
        lines = _lines(runs, lambda record, key=key: (record.case.get("audio_seconds"), record.values.get(key)))  # type: ignore[misc]
        if lines:
            panels[what] = lines
    if not panels:
        return None
    figure = _figure(4.2)
    every = list(dict.fromkeys(line for lines in panels.values() for line in lines))
    for column, (what, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), column)
        axes.set_title(what, loc="left")
        _draw_lines(axes, lines, every)
        axes.set_xscale("log")
        axes.set_xticks(_spaced(sorted({x for points in lines.values() for x in points}), len(panels)), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g} s" if value < 60 else f"{value / 60:.3g} min")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e9:.3g}")
        axes.set_xlabel("length of the audio")
        axes.set_ylabel("GB")
        axes.set_ylim(0, 1.12 * max(peak for points in lines.values() for peak in points.values()))
    _lines_legend(figure, figure.axes)
    _add_note(figure, _note(max(map(len, panels.values()))))
    return figure


@_styled
def roofline(records: list[Record]) -> "Figure | None":
    """Each measured kernel between the ceilings of its machine, one panel a machine. FLOP/s by FLOP/byte.

    The ceilings are those measured there, else the datasheet's, which the labels say.
    """
    machines: dict[str, list[Record]] = {}
    for record in records:
        if record.bench == "kernels" and record.kind != "projected" and _kernel_point(record):
            machines.setdefault(labels.machine_label(record.machine), []).append(record)
    if not machines:
        return None
    names = sorted({labels.clean(record.name) for kernels in machines.values() for record in kernels})
    figure = _figure(5.4 * len(machines))
    slopes = []
    for row, (machine, kernels) in enumerate(machines.items(), start=1):
        axes = figure.add_subplot(len(machines), 1, row)
        axes.set_title(labels.short(machine, 90) or "unknown machine", loc="left")
        roofs = _roofs(machine, kernels[0], records)
        points = [(record, point) for record in kernels if (point := _kernel_point(record))]
        for record, point in points:
            colour, marker = _operation_style(names.index(labels.clean(record.name)))
            face = colour if record.subject.startswith("afnext") else "white"
            axes.plot(*point, marker=marker, color=colour, markerfacecolor=face, markersize=7, linestyle="none")
        _draw_roofs(axes, *roofs, [point for _, point in points])
        slopes.append((axes, roofs))
        axes.set_xlabel("FLOP/byte")
        axes.set_ylabel("FLOP/s")
        axes.grid(color="#EEEEEE", which="major")
    _roofline_legend(figure, names)
    figure.draw_without_rendering()  # the slope of a line on the page is known once the layout is
    for axes, (bandwidth, _, source) in slopes:
        if bandwidth:
            _along(axes, bandwidth, f"{_si(bandwidth)}B/s ({source})")
    return figure


def _kernel_point(record: Record) -> tuple[float, float] | None:
    flops, moved, median = (labels.positive(record.values.get(key)) for key in ("flops", "bytes", "median_s"))
    return (flops / moved, flops / median) if flops and moved and median else None


def _roofs(machine: str, kernel: Record, records: list[Record]) -> tuple[float | None, dict[str, float], str]:
    """Bandwidth in bytes/s, FLOP/s by dtype, and where the two come from."""
    ceilings = [record for record in records if record.name == "ceiling"]
    for record in sorted(ceilings, key=lambda record: record.case.get("quick") is True):
        if labels.machine_label(record.machine) == machine:
            rates = {key: rate for key in record.values if (rate := labels.positive(record.values[key])) is not None}
            bandwidths = [rate for key, rate in rates.items() if key in ("copy_bytes_per_s", "read_bytes_per_s")]
            flops = {labels.clean(key)[:-12]: rate for key, rate in rates.items() if key.endswith("_flops_per_s")}
            source = "measured, quick" if record.case.get("quick") is True else "measured"
            return max(bandwidths, default=None), flops, source
    gpu = kernel.machine.get("gpu")
    device = find_device(str(gpu.get("name"))) if isinstance(gpu, dict) else None
    return (None, {}, "") if device is None else (device.bandwidth, dict(device.flops), "datasheet")


def _draw_roofs(
    axes: "Axes",
    bandwidth: float | None,
    flops: dict[str, float],
    source: str,
    points: list[tuple[float, float]],
) -> None:
    xs, ys = zip(*points, strict=True)
    ridges = [rate / bandwidth for rate in flops.values()] if bandwidth else []
    left, right = min(*xs, 0.25), max(*xs, *ridges, 1.0) * 6
    axes.set_xlim(left / 2, right)
    lowest = min(ys) if not bandwidth else min(*ys, bandwidth * left)
    axes.set_ylim(lowest / 2, max(*ys, *flops.values(), 1.0) * 3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: _si(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    line: dict[str, Any] = {"color": "black", "linewidth": 1.2}
    if bandwidth:
        peak = max(flops.values(), default=bandwidth * right)
        end = min(peak / bandwidth, right)
        axes.plot([left / 2, end], [bandwidth * left / 2, bandwidth * end], **line)
    bottom, top = axes.get_ylim()
    step = (top / bottom) ** 0.036  # the height of a label, as a factor on the axis
    lowest_free = 0.0
    for names, rate in _merged(flops):
        axes.plot([rate / bandwidth if bandwidth else left / 2, right], [rate, rate], **line)
        y = max(rate, lowest_free)
        text = f"{labels.short(names, 40)} {_si(rate)}FLOP/s ({source}) "
        veil = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
        axes.text(right, y, text, ha="right", va="bottom", size=8, bbox=veil, zorder=5)
        lowest_free = y * step


def _merged(flops: dict[str, float]) -> list[tuple[str, float]]:
    """The roofs from low to high; those within 5 % of each other are one, at the lowest of their rates."""
    roofs: list[tuple[str, float]] = []
    for dtype, rate in sorted(flops.items(), key=lambda item: item[1]):
        if roofs and rate <= 1.05 * roofs[-1][1]:
            roofs[-1] = f"{roofs[-1][0]}, {dtype}", roofs[-1][1]
        else:
            roofs.append((dtype, rate))
    return roofs


def _along(axes: "Axes", bandwidth: float, text: str) -> None:
    """Write `text` above the sloped roof y = bandwidth x, from its lower end on."""
    x = max(axes.get_xlim()[0], axes.get_ylim()[0] / bandwidth) * 1.3
    (x0, y0), (x1, y1) = axes.transData.transform([(x, bandwidth * x), (10 * x, bandwidth * 10 * x)])
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    offset: dict[str, Any] = {"xytext": (-3, 3), "textcoords": "offset points"}
    axes.annotate(text, (x, bandwidth * x), **offset, rotation=angle, rotation_mode="anchor", size=8)


def _operation_style(index: int) -> tuple[str, str]:
    return PALETTE[index % len(PALETTE)], _MARKERS[(index + index // len(PALETTE)) % len(_MARKERS)]


def _roofline_legend(figure: "Figure", names: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for index, name in enumerate(names[:_MOST]):
        colour, marker = _operation_style(index)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=labels.short(name, 28)))
    grey: dict[str, Any] = {"color": "#555555", "marker": "o", "linestyle": "none"}
    handles.append(Line2D([], [], **grey, label="filled: afnext"))
    handles.append(Line2D([], [], **grey, markerfacecolor="white", label="hollow: others"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


def _lines(records: list[Record], point: Callable[[Record], tuple[Any, Any]]) -> Lines:
    """The records' points by subject, batch and kind; the larger y where two have the same x."""
    found = []
    for record in records:
        x, y = map(labels.positive, point(record))
        if x is not None and y is not None:
            found.append((record, x, y))
    named = _namer([record for record, _, _ in found])
    lines: Lines = {}
    for record, x, y in found:
        batch = labels.number(record.case.get("batch"))
        layers = labels.case_label({"layers": record.case.get("layers")})
        label = ", ".join(filter(None, (named(record), layers, f"batch {batch:g}" if batch not in (None, 1.0) else "")))
        points = lines.setdefault((label, record.kind), {})
        points[x] = max(y, points.get(x, 0.0))
    return lines


def _draw_lines(axes: "Axes", lines: Lines, every: list[tuple[str, str]]) -> None:
    """every: the lines of all panels, so that a subject looks the same in each."""
    subjects = list(dict.fromkeys(label for label, _ in every))
    for (label, kind), points in list(lines.items())[:_MOST]:
        index = subjects.index(label)
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(
            *zip(*sorted(points.items()), strict=True),
            color=colour,
            marker=_MARKERS[index % len(_MARKERS)],
            markerfacecolor=colour if kind == "measured" else "white",
            linestyle=_LINES[kind],
            label=labels.short(label, 52) + ("" if kind == "measured" else f" ({kind})"),
        )
    axes.grid(color="#E5E5E5")


def _lines_legend(figure: "Figure", panels: Iterable["Axes"]) -> None:
    handles = {str(line.get_label()): line for axes in panels for line in axes.get_lines()}
    figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=min(len(handles), 2), frameon=False)


def _namer(records: list[Record]) -> Callable[[Record], str]:
    """The names of the subjects of one plot, with their machine only if there are several."""
    several = len({labels.machine_label(record.machine) for record in records}) > 1
    return lambda r: _subject(r) + (f" on {labels.machine_label(r.machine) or 'unknown machine'}" if several else "")


def _subject(record: Record) -> str:
    """The subject with its scheme, unless that is redundant."""
    subject, scheme = labels.clean(record.subject), labels.clean(record.case.get("scheme") or "")
    known = scheme in subject or (scheme == "bf16" and "bfloat16" in subject)
    return subject if known else f"{subject} {scheme}"


def _spaced(values: list[float], panels: int) -> list[float]:
    """Those of the ascending values that are far enough apart on a logarithmic axis for their labels not to collide."""
    factor = (values[-1] / values[0]) ** (0.07 * panels)
    kept: list[float] = []
    for value in values:
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept


def _bar_labels(axes: "Axes", texts: list[str], length: int = 44) -> None:
    axes.set_yticks(range(len(texts)), ["\n".join(labels.short(part, length) for part in t.split("\n")) for t in texts])
    axes.set_ylim(len(texts) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _capped(
    panels: Panels,
) -> tuple[Panels, str]:
    flat = [(panel, bar, stages) for panel, bars in panels.items() for bar, stages in bars.items()]
    kept: Panels = {}
    for panel, bar, stages in flat[:_MOST]:
        kept.setdefault(panel, {})[bar] = stages
    return kept, _note(len(flat))


def _note(count: int) -> str:
    return f"the first {_MOST} of {count}; the table has all" if count > _MOST else ""


def _add_note(figure: "Figure", note: str) -> None:
    if note:
        figure.supxlabel(note, size=8, color="#555555")


def _patch(colour: str, label: str, hatch: str = "") -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, label=label, hatch=hatch, edgecolor="white")


def _kind_patches(kinds: Iterable[str]) -> list[Any]:
    """Legend entries of the kinds that were not measured."""
    present = set(kinds)
    return [_patch(GREY, kind, hatch) for kind, hatch in _HATCHES.items() if hatch and kind in present]


def _si(value: float) -> str:
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")
