"""Files of results: read back as written, resumed after an interruption, loud about damage."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afnext.bench.core.record import Record, ResultsError, append, finished, read

RECORDS = [
    Record("kernels", "attention", "afnext bfloat16", {"keys": 1500}, {"median_s": 0.25}, machine={"cpu": "one"}),
    Record("kernels", "attention", "torch bfloat16", {"keys": 1500}, {"median_s": 0.5, "note": "näher"}),
    Record("e2e", "decode", "afnext int4", {"audio_s": 300}, {"tokens_per_s": 12.5}, kind="extrapolated"),
]


def written(path: Path) -> Path:
    for record in RECORDS:
        append(path, record)
    return path


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "folder" / "results.jsonl")
    assert list(read(path)) == RECORDS
    assert finished(path) == {record.key for record in RECORDS}


def test_every_line_is_json_on_its_own(tmp_path: Path) -> None:
    lines = written(tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["attention", "attention", "decode"]


def test_without_a_file_nothing_is_finished_and_reading_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    assert finished(path) == set()
    with pytest.raises(ResultsError, match="afnext bench"):
        list(read(path))


@pytest.mark.parametrize("cut", [1, 2, 40, 90])
def test_a_run_goes_on_behind_a_line_that_was_cut_short(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "results.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read(path)) == RECORDS[:2]
    append(path, RECORDS[2])
    assert list(read(path)) == RECORDS


def test_a_line_may_be_cut_within_a_character(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, RECORDS[0])
    append(path, RECORDS[1])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index("ä".encode()) + 1])
    assert list(read(path)) == RECORDS[:1]
    append(path, RECORDS[1])
    assert path.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "results.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([lines[0], '{"bench": 1\n', lines[2]]), encoding="utf-8")
    with pytest.raises(ResultsError, match="line 2"):
        list(read(path))


def test_a_line_with_other_fields_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"time": 3}\n', encoding="utf-8")
    with pytest.raises(ResultsError, match="line 1"):
        list(read(path))


def test_the_key_knows_the_thing_measured_and_not_the_figures_or_the_machine() -> None:
    first = Record("kernels", "gelu", "afnext", {"rows": 1, "channels": 2}, {"median_s": 1.0}, machine={"cpu": "a"})
    again = Record("kernels", "gelu", "afnext", {"channels": 2, "rows": 1}, {"median_s": 2.0}, machine={"cpu": "b"})
    assert first.key == again.key
    others = [
        Record("e2e", "gelu", "afnext", first.case, first.values),
        Record("kernels", "swiglu", "afnext", first.case, first.values),
        Record("kernels", "gelu", "torch", first.case, first.values),
        Record("kernels", "gelu", "afnext", {"rows": 2, "channels": 2}, first.values),
        Record("kernels", "gelu", "afnext", first.case, first.values, kind="projected"),
    ]
    assert len({record.key for record in [first, *others]}) == 6


@given(st.text(), st.dictionaries(st.text(), st.integers() | st.text()), st.dictionaries(st.text(), st.floats(0, 1e9)))
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory, name: str, case: dict[str, int | str], values: dict[str, float]
) -> None:
    record = Record("kernels", name, "afnext", case, values)
    path = tmp_path_factory.mktemp("results") / "results.jsonl"
    append(path, record)
    append(path, record)
    assert list(read(path)) == [record, record]
