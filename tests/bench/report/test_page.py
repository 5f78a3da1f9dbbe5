"""Reports of planted results: what they say, what they must not, and that hostile results stay text."""

import json
import re
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import afnext
from afnext.bench.core.record import Record, ResultsError
from afnext.bench.report import labels, plots
from afnext.bench.report.page import write_report

CPU = {"cpu": "EPYC", "cores": 2, "gpu": None, "versions": {"torch": "2.13.0"}, "commit": "abc123"}
H100 = {**CPU, "gpu": {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85e9}}
CASE = {"audio_seconds": 300, "batch": 1, "scheme": "bf16"}
OURS, REFERENCE = "afnext bfloat16", "transformers bfloat16"


def e2e(name: str, seconds: float, subject: str = OURS, case: dict[str, Any] | None = None, **values: Any) -> Record:
    timed = {"median_s": seconds, "p20_s": 0.9 * seconds, "p80_s": 1.1 * seconds}
    return Record("e2e", name, subject, {**CASE, **(case or {})}, timed | values, machine=CPU)


def kernel(name: str, seconds: float, subject: str = OURS, **values: Any) -> Record:
    counted = {"median_s": seconds, "flops": 1e9, "bytes": 1e7, "tflops_per_s": 1e-3 / seconds, "gb_per_s": 0.01}
    case = {"label": "prefill 1024", "dtype": "bfloat16", "rows": 1024}
    return Record("kernels", name, subject, case, counted | values, machine=CPU)


CEILING = {"copy_bytes_per_s": 2e10, "read_bytes_per_s": 3e10}
CEILING |= {"float32_flops_per_s": 1e11, "bfloat16_flops_per_s": 2e11}
RESULTS = [
    *(e2e(stage, seconds) for stage, seconds in (("encode", 1.0), ("prefill", 2.0), ("decode", 4.0))),
    *(e2e(stage, 3 * seconds, REFERENCE) for stage, seconds in (("encode", 1.0), ("prefill", 2.0))),
    e2e("total", 8.0, speedup=2.5, agrees=True, peak_rss_bytes=3e9, peak_device_bytes=17e9, real_time_factor=37.5),
    e2e("total", 20.0, REFERENCE, peak_rss_bytes=5e9),
    *(e2e("decode", 1.0, case={"context": context}, tokens_per_s=50) for context in (1024, 4096)),
    kernel("attention", 0.02, speedup=1.7, relative_error=1e-3),
    kernel("attention", 0.034, "torch bfloat16"),
    Record("kernels", "ceiling", "machine", {"quick": False}, CEILING, machine=CPU),
    Record("quality", "word error rate", OURS, {"manifest": "x.jsonl"}, {"wer": 0.0425}, machine=CPU),
]


def write(path: Path, *records: Record) -> Path:
    """With escapes and NaN, as a file from elsewhere can be."""
    path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    return path


class Page(HTMLParser):
    """The text of the tables, row by row, all tags and their attributes, and all text."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.in_cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.in_cell:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = False

    def rows_with(self, *words: str) -> list[list[str]]:
        return [row for row in self.rows if all(word in row for word in words)]


def report(tmp_path: Path, *records: Record) -> Page:
    page, _ = write_report([write(tmp_path / "results.jsonl", *records)], tmp_path / "out")
    return Page(page)


def test_a_full_report_has_every_section_and_plot(tmp_path: Path) -> None:
    page, text = write_report([write(tmp_path / "results.jsonl", *RESULTS)], tmp_path / "out")
    titles = re.findall(r"^## (.+)$", text.read_text(), re.MULTILINE)
    assert titles == [
        "Machines",
        "Where the time goes",
        "Speed against the reference",
        "Decoding by the length of the context",
        "Memory by the length of the audio",
        "Kernels on the roofline",
        "Kernels against the baseline",
        "Quality",
        "On GPUs",
    ]
    pictures = [attributes["src"] for tag, attributes in Page(page).tags if tag == "img"]
    assert len(pictures) == 6
    files = re.findall(r"!\[[^]]*]\(([^)]+)\)", text.read_text())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    page, _ = write_report([write(tmp_path / "results.jsonl", *RESULTS)], tmp_path / "out")
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "a", "base", "form"} == set()
    for _, attributes in parsed.tags:
        for name, value in attributes.items():
            assert name not in ("href", "style", "srcset")
            assert not name.startswith("on")
            assert name != "src" or (value or "").startswith("data:image/png;base64,")
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+|http-equiv", "", page.read_text())


def test_figures_stand_in_the_tables_with_units(tmp_path: Path) -> None:
    page = report(tmp_path, *RESULTS)
    (total,) = page.rows_with("total", OURS)
    assert total[2:] == [OURS, "measured", "8 s", "7.2 s – 8.8 s", "", "37.5", "17 GB", "3 GB", "2.5×"]
    (attention,) = page.rows_with("attention", "prefill 1024, dtype bfloat16", OURS)
    assert "20 ms" in attention
    assert "1.7×" in attention
    assert page.rows_with("word error rate", "wer", "0.0425")
    assert page.rows_with("versions.torch", "2.13.0")


HOSTILE = "<img src=x onerror=alert(1)>\"'&|`[x](http://evil)![y](http://evil/p.png)$\\frac{$\x1b[2J\u202e\ud800"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    machine = {"cpu": HOSTILE, "cores": HOSTILE, HOSTILE: HOSTILE}
    case = {"audio_seconds": 30, HOSTILE: HOSTILE, "scheme": HOSTILE, "context": 10, "model": HOSTILE}
    values = {"median_s": 1.0, "speedup": 2.0, "agrees": True, "tokens_per_s": 3, "peak_rss_bytes": 1e9}
    values[HOSTILE] = HOSTILE
    names = ("encode", "decode", "total")
    evil = [Record("e2e", name, HOSTILE, case, values, machine=machine) for name in names]
    work = {"flops": 1e6, "bytes": 1e6, "reason": HOSTILE}
    evil += [Record("kernels", HOSTILE, HOSTILE, case, values | work, machine=machine)]
    evil += [Record("quality", HOSTILE, HOSTILE, case, values, machine=machine)]
    evil += [Record("kernels", "ceiling", "x", {}, {f"{HOSTILE}_flops_per_s": 1e9}, machine=machine)]
    results = write(tmp_path / "results.jsonl", *evil)
    page, text = write_report([results], tmp_path / "out")
    parsed = Page(page)
    pictures = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert all(set(attributes) == {"alt", "src"} for attributes in pictures)
    assert "<img src=x onerror=alert(1)>" in parsed.text
    raw = text.read_text(encoding="utf-8")
    assert re.findall(r"(?<!\\)!\[", raw) == ["!["] * len(pictures)
    assert not re.search(r"<\w|://|(?<!\\)]\(http|\x1b|\u202e", raw)
    rows = [line.replace("\\|", "") for line in raw.split("\n") if line.startswith(("| stage", "| encode"))]
    assert len({row.count("|") for row in rows}) == 1 < len(rows)  # a | in a name opens no further column


REFUSED = [
    ({"speedup": 9.75, "agrees": False, "reason": "3 differ"}, "none: the outputs disagree (3 differ)"),
    ({"speedup": 9.75, "agrees": False}, "none: the outputs disagree"),
    ({"speedup": 9.75}, "none: the outputs were not compared"),
    ({"speedup": 9.75, "agrees": "yes"}, "none: the outputs were not compared"),
    ({"speedup": None, "agrees": True, "reason": "the spreads overlap"}, "none: the spreads overlap"),
    ({"speedup": None, "relative_error": 1.0, "no_speedup": "outputs differ"}, "none: outputs differ"),
    ({"speedup": 9.75, "relative_error": 1.0, "no_speedup": "outputs differ"}, "none: outputs differ"),
]


def test_no_speedup_where_the_outputs_were_not_found_equal(tmp_path: Path) -> None:
    records = [e2e("prefill", 1.0, case={"batch": i}, **values) for i, (values, _) in enumerate(REFUSED)]
    page = report(tmp_path, *records)
    assert [row[-1] for row in page.rows_with("prefill", OURS)] == [cell for _, cell in REFUSED]
    assert "9.75" not in page.text
    assert not (tmp_path / "out" / "speedup.png").exists()


def test_kinds_are_labelled_and_never_drawn_as_one(tmp_path: Path) -> None:
    contexts = [
        replace(e2e("decode", 1.0, case={"context": context}, tokens_per_s=rate), kind=kind)
        for kind, rate in (("measured", 10), ("extrapolated", 20), ("projected", 40))
        for context in (1024, 2048)
    ]
    stages = [replace(e2e("encode", 1.0), kind=kind) for kind in labels.KINDS]
    page = report(tmp_path, *contexts, *stages)
    kinds = [row[3] for row in page.rows if row[0] in ("decode", "encode")]
    assert sorted(kinds) == sorted([*labels.KINDS] * 3)
    shaded = [attributes["class"] for tag, attributes in page.tags if tag == "tr" and attributes.get("class")]
    assert sorted(set(shaded)) == sorted(labels.KINDS)
    figure = plots.tokens_by_context(contexts)
    assert figure is not None
    lines = {line.get_label(): (line.get_linestyle(), list(line.get_ydata())) for line in figure.axes[0].get_lines()}
    assert lines == {
        OURS: ("-", [10, 10]),
        f"{OURS} (extrapolated)": ("--", [20, 20]),
        f"{OURS} (projected)": (":", [40, 40]),
    }
    bars = plots.stage_breakdown(stages)
    assert bars is not None
    assert sorted(str(patch.get_hatch() or "") for patch in bars.axes[0].patches) == ["", "....", "////"]
    assert [label.get_text().split("\n")[-1] for label in bars.axes[0].get_yticklabels()] == [
        OURS,
        "(extrapolated)",
        "(projected)",
    ]


def test_stage_bars_have_the_lengths_of_the_medians() -> None:
    figure = plots.stage_breakdown([e2e("encode", 1.5), e2e("decode", 0.25, new_tokens=17), e2e("total", 6.0)])
    assert figure is not None
    assert [patch.get_width() for patch in figure.axes[0].patches] == [1.5, 4.0, 0.5]
    assert figure.axes[0].texts[-1].get_text().strip() == "6 s in all"
    apart = plots.stage_breakdown([e2e("encode", 1.5), e2e("total", 1.0)])
    assert apart is not None
    assert apart.axes[0].texts[-1].get_text().strip() == "1.5 s in stages, 1 s in all"
    unknown = plots.stage_breakdown([e2e("encode", 1.5), e2e("decode", 0.25), e2e("total", 6.0)])
    assert unknown is not None
    assert [patch.get_width() for patch in unknown.axes[0].patches] == [1.5, 4.5]


def test_few_layers_never_pass_for_the_whole_model() -> None:
    few = e2e("decode", 0.1, case={"layers": [2, 4]}, tokens_per_s=10, context=7500, new_tokens=9, working_bytes=1e9)
    whole = replace(few, case={**few.case, "layers": [32, 28]}, kind="extrapolated")
    for figure in (plots.tokens_by_context([few, whole]), plots.memory_by_audio([few, whole])):
        assert figure is not None
        names = [line.get_label() for line in figure.axes[0].get_lines()]
        assert names == [f"{OURS}, 2 + 4 layers", f"{OURS}, 32 + 28 layers (extrapolated)"]
    bars = plots.stage_breakdown([few, whole])
    assert bars is not None
    assert [axes.get_title(loc="left").split(", ")[-1] for axes in bars.axes] == ["2 + 4 layers", "32 + 28 layers"]
    faster = [replace(few, name=name, values={"speedup": 2.0, "agrees": True}) for name in ("encode", "prefill")]
    speedups = plots.speedup(faster, "the reference")
    assert speedups is not None
    assert "2 + 4 layers" in speedups.get_supxlabel()


def test_kernels_stand_at_their_intensity_under_the_measured_ceilings() -> None:
    records = [kernel("attention", 0.02), replace(kernel("attention", 0.01), kind="projected")]
    figure = plots.roofline([*records, Record("kernels", "ceiling", "machine", {}, CEILING, machine=CPU)])
    assert figure is not None
    (axes,) = figure.axes
    points = [tuple(map(float, line.get_xydata()[0])) for line in axes.get_lines() if line.get_marker() == "o"]
    assert points == [(100.0, 5e10)]  # the projection lies on a roof and is left out
    texts = " ".join(text.get_text() for text in axes.texts)
    assert "30 GB/s (measured)" in texts
    assert "bfloat16 200 GFLOP/s (measured)" in texts
    flat = [line.get_ydata()[0] for line in axes.get_lines() if len(set(line.get_ydata())) == 1 < len(line.get_ydata())]
    assert sorted(flat) == [1e11, 2e11]


def test_without_measured_ceilings_the_datasheet_is_named() -> None:
    figure = plots.roofline([replace(kernel("attention", 1e-5), machine=H100)])
    assert figure is not None
    texts = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "3.35 TB/s (datasheet)" in texts
    assert "bfloat16" in texts
    unknown = plots.roofline([kernel("attention", 1e-5)])
    assert unknown is not None
    assert not unknown.axes[0].texts


def test_machines_are_told_apart(tmp_path: Path) -> None:
    slow, fast = e2e("encode", 9.0), replace(e2e("encode", 1.0), machine=H100)
    page = report(tmp_path, slow, fast)
    assert page.rows_with("encode", "EPYC, 2 cores", "9 s")
    assert page.rows_with("encode", "NVIDIA H100 80GB HBM3", "1 s")
    figure = plots.stage_breakdown([slow, fast])
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "300 s audio, batch 1 on EPYC, 2 cores",
        "300 s audio, batch 1 on NVIDIA H100 80GB HBM3",
    ]


def test_the_latest_of_repeated_measurements_counts_and_that_is_said(tmp_path: Path) -> None:
    page = report(tmp_path, e2e("decode", 9.0), e2e("decode", 1.0))
    (row,) = page.rows_with("decode", OURS)
    assert "1 s" in row
    assert "1 older measurements" in page.text


def test_values_that_are_no_numbers_do_no_harm(tmp_path: Path) -> None:
    keys = {"speedup", "tokens_per_s", "peak_rss_bytes", "flops", "bytes", "percent_of_ceiling", "p20_s", "p80_s"}
    records = [kernel("swiglu", 0.1)]
    for value in (None, "fast", True, float("nan"), float("inf"), -1.0, 0, 10**400, [], {}):
        broken = dict.fromkeys(keys | set(CEILING) | {"median_s"}, value) | {"agrees": True}
        case = {"audio_seconds": value, "context": value, "batch": value}
        machine = {"gpu": value, "cpu": value}
        records += [
            Record("e2e", "decode", OURS, case, broken, machine=CPU),
            Record("e2e", "total", OURS, case, e2e("total", 1.0).values, machine=machine),
            Record("kernels", "attention", OURS, {"label": value}, broken, machine=machine),
            Record("kernels", "ceiling", "machine", case, broken, machine=CPU),
        ]
    page = report(tmp_path, *records)
    assert len(page.rows_with("decode")) == 10
    assert page.rows_with("swiglu", "100 ms")


@given(st.floats(1e-9, 1e9))
def test_times_are_written_with_three_digits(value: float) -> None:
    text, unit = labels.seconds(value).replace(",", "").split(" ")
    assert float(text) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit] == pytest.approx(value, rel=5.1e-3)


def test_long_results_are_cut_in_plots_but_not_in_tables(tmp_path: Path) -> None:
    many = [e2e("prefill", 1.0, f"subject {i}", speedup=1.5, agrees=True) for i in range(60)]
    figure = plots.speedup(many, "the reference")
    assert figure is not None
    assert len(figure.axes[0].get_yticklabels()) == 48
    assert "48 of 60, of each name in turn; the table has all" in figure.get_supxlabel()
    assert len(report(tmp_path, *many).rows_with("prefill")) == 60


def test_a_cut_plot_shows_every_operation() -> None:
    names = ["linear"] * 60 + ["rms_norm", "sample"]
    many = [e2e(name, 1.0, f"subject {i}", speedup=1.5, agrees=True) for i, name in enumerate(names)]
    figure = plots.speedup(many, "the reference")
    assert figure is not None
    shown = [label.get_text().split(" · ")[0] for label in figure.axes[0].get_yticklabels()]
    assert sorted(shown) == sorted(["linear"] * 46 + ["rms_norm", "sample"])


def test_folders_and_several_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    write(tmp_path / "results" / "a.jsonl", e2e("decode", 1.0))
    other = write(tmp_path / "b.jsonl", e2e("encode", 1.0))
    page = Page(write_report([tmp_path / "results", other], tmp_path / "out")[0])
    assert page.rows_with("decode")
    assert page.rows_with("encode")


def test_nothing_to_report_and_damage_are_said(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no results"):
        write_report([], tmp_path / "out")
    with pytest.raises(ResultsError, match="no results"):
        write_report([tmp_path], tmp_path / "out")
    with pytest.raises(ResultsError, match="kind 'guessed'"):
        report(tmp_path, replace(e2e("decode", 1.0), kind="guessed"))
    results = write(tmp_path / "results.jsonl", e2e("decode", 1.0))
    with pytest.raises(ResultsError, match="is a file"):
        write_report([results], results)
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(afnext.AfnextError, match="pip install matplotlib"):
        report(tmp_path, e2e("decode", 1.0))


def test_the_gpu_section_says_that_none_has_run_until_one_has(tmp_path: Path) -> None:
    assert "Not yet run." in report(tmp_path, *RESULTS).text
    page = report(tmp_path, *RESULTS, replace(e2e("encode", 1.0), machine=H100))
    assert "Not yet run." not in page.text
    assert ["NVIDIA H100 80GB HBM3", "1"] in page.rows
    projected = replace(e2e("encode", 1.0), machine=H100, kind="projected")
    assert "Not yet run." in report(tmp_path, *RESULTS, projected).text, "a projection has not run"


def test_the_history_has_what_was_measured_at_several_commits(tmp_path: Path) -> None:
    before = {**CPU, "commit": "1111111111aaaa", "timestamp": "2026-01-02T03:04:05"}
    after = {**CPU, "commit": "2222222222bbbb", "timestamp": "2026-03-04T05:06:07"}
    once = replace(e2e("prefill", 2.0), machine=after)
    records = (replace(e2e("encode", 0.5), machine=after), replace(e2e("encode", 1.0), machine=before), once)
    page = report(tmp_path, *records)
    history = [row for row in page.rows if "1111111111" in row or "2222222222" in row]
    assert [row[-5:] for row in history] == [
        ["1111111111", "2026-01-02", "measured", "1 s", "1.00×"],
        ["2222222222", "2026-03-04", "measured", "500 ms", "0.50×"],
    ]
    assert {row[0] for row in history} == {"encode"}
    assert "History" not in report(tmp_path, once).text
