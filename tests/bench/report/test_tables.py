"""Tables of results in a page: their cells, that the rest of the page stays, and that the committed page is current."""

from pathlib import Path

import pytest

from afnext.bench.core.record import Record, ResultsError, append
from afnext.bench.report.tables import filled, update

ROOT = Path(__file__).parents[3]
MACHINE = {
    "cpu": "EPYC",
    "cores": 2,
    "threads": 2,
    "isa": ["avx2"],
    "commit": "0123456789",
    "timestamp": "2026-01-02T03",
}
PAGE = "before\n<!-- results: a.jsonl -->\nold\n<!-- end of results -->\nafter\n"


def layer(subject: str, seconds: float, depth: int = 0, **values: object) -> Record:
    case = {"label": f"1 token after {depth}", "model": "full", "depth": depth}
    return Record("layers", "decode", subject, case, {"median_s": seconds, **values}, machine=MACHINE)


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells}


def test_one_row_per_case_and_one_column_per_subject(tmp_path: Path) -> None:
    append(tmp_path / "a.jsonl", layer("afnext int4", 0.02, speedup=5.0, percent_of_read=91.24))
    append(tmp_path / "a.jsonl", layer("transformers", 0.1))
    append(tmp_path / "a.jsonl", layer("transformers", 0.3, depth=8192))
    text = filled(PAGE, tmp_path)
    assert text.startswith("before\n<!-- results: a.jsonl -->\nEPYC, 2 cores, 2 threads")
    assert text.endswith("\n<!-- end of results -->\nafter\n")
    assert "2026-01-02 at 0123456" in text
    assert rows(text) == {
        "": ["transformers", "afnext int4"],
        "---": ["---:", "---:"],
        "decode, 1 token after 0 (full)": ["100 ms", "20 ms, 5.00x"],
        "– share of read bandwidth": ["", "91.2 %"],
        "decode, 1 token after 8192 (full)": ["300 ms", ""],
    }


@pytest.mark.parametrize("values", [{"agrees": False}, {"reason": "the outputs differ by 0.3"}])
def test_no_speedup_where_outputs_differ(tmp_path: Path, values: dict[str, object]) -> None:
    append(tmp_path / "a.jsonl", layer("afnext int4", 0.02, speedup=5.0, **values))
    assert rows(filled(PAGE, tmp_path))["decode, 1 token after 0 (full)"] == ["20 ms"]


def test_text_of_records_is_no_markup(tmp_path: Path) -> None:
    append(tmp_path / "a.jsonl", layer("a | <b>[x](y)", 0.02, note="not `compared`", warning="slow | by `far`"))
    text = filled(PAGE, tmp_path)
    assert r"a \| &lt;b&gt;\[x\](y)" in text
    assert r"Not \`compared\`." in text
    assert r"Warning: a \| &lt;b&gt;\[x\](y), decode, 1 token after 0 (full): slow \| by \`far\`." in text


def test_only_the_bench_that_is_named(tmp_path: Path) -> None:
    append(tmp_path / "a.jsonl", layer("transformers", 0.1))
    append(tmp_path / "a.jsonl", Record("serving", "listening", "afnext", {}, {"kv_bytes": 2e9, "first_s": 0.5}))
    serving = filled(PAGE.replace(".jsonl -->", ".jsonl serving -->"), tmp_path)
    assert "first 500 ms; kv 2 GB" in serving
    assert "transformers" not in serving


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"a\.jsonl"):
        filled(PAGE, tmp_path)
    append(tmp_path / "a.jsonl", layer("transformers", 0.1))
    with pytest.raises(ResultsError, match="no results of e2e"):
        filled(PAGE.replace(".jsonl -->", ".jsonl e2e -->"), tmp_path)
    with pytest.raises(ResultsError, match="end of results"):
        filled("a page without markers", tmp_path)


def test_update_says_whether_the_page_changed(tmp_path: Path) -> None:
    append(tmp_path / "a.jsonl", layer("transformers", 0.1))
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert update(page, tmp_path)
    assert not update(page, tmp_path)
    assert "old" not in page.read_text()


def test_the_committed_page_is_current() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    stale = "run `afnext bench tables docs/performance.md`"
    assert filled(page, ROOT / "bench" / "results") == page, stale
    results = {path.name for path in (ROOT / "bench" / "results").glob("*.jsonl")}
    assert not {name for name in results if f"<!-- results: {name}" not in page}, "a file of results has no table"
