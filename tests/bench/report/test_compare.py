"""Planted pairs of results: what is flagged, what is not, and what is said about the machines."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from afnext.bench.core.record import Record, ResultsError, append
from afnext.bench.report.compare import compare, render, to_dict

MACHINE = {"cpu": "EPYC", "cores": 8, "gpu": {"name": "H100", "sm_mhz": 1000}, "versions": {"torch": "2.13"}}
PREFILL = Record("e2e", "prefill", "afnext", {"audio_seconds": 30, "batch": 1}, {}, machine=MACHINE)


def timed(median: float, low: float, high: float, **changes: Any) -> Record:
    values = {"median_s": median, "p20_s": low, "p80_s": high, "tokens_per_s": 1 / median}
    return replace(PREFILL, values=values, **changes)


def write(path: Path, *records: Record) -> Path:
    path.unlink(missing_ok=True)
    for record in records:
        append(path, record)
    if not records:
        path.touch()
    return path


def shown(comparison: Any, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(comparison))
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ((2.0, 1.9, 2.1), "worse"),  # a planted slow-down
        ((0.5, 0.4, 0.6), "better"),
        ((1.2, 1.1, 1.3), "within spread"),  # 1.1 touches the 80th percentile of the other
        ((1.2, 1.11, 1.3), "worse"),
        ((5.0, 0.1, 9.0), "within spread"),
    ],
)
def test_only_differences_beyond_the_spreads_are_flagged(
    tmp_path: Path, after: tuple[float, float, float], verdict: str
) -> None:
    a, b = write(tmp_path / "a", timed(1.0, 0.9, 1.1)), write(tmp_path / "b", timed(*after))
    (row,) = compare(a, b).rows
    assert (row.verdict, row.metric, row.ratio) == (verdict, "median_s", pytest.approx(after[0]))
    assert row.flagged == (verdict != "within spread")
    assert verdict in shown(compare(a, b))


@given(st.lists(st.floats(0.01, 100), min_size=6, max_size=6))
def test_swapping_the_files_swaps_the_verdict(tmp_path_factory: pytest.TempPathFactory, times: list[float]) -> None:
    folder = tmp_path_factory.mktemp("swap")
    (low_a, mid_a, high_a), (low_b, mid_b, high_b) = sorted(times[:3]), sorted(times[3:])
    a, b = write(folder / "a", timed(mid_a, low_a, high_a)), write(folder / "b", timed(mid_b, low_b, high_b))
    (there,), (back,) = compare(a, b).rows, compare(b, a).rows
    opposite = {"better": "worse", "worse": "better"}
    assert opposite.get(there.verdict, there.verdict) == back.verdict
    assert there.ratio is not None
    assert there.ratio * (back.ratio or 0) == pytest.approx(1)


def test_more_is_better_for_rates_and_less_for_errors(tmp_path: Path) -> None:
    accuracy = replace(PREFILL, bench="quality", name="accuracy")
    wer = replace(PREFILL, bench="quality", name="word error rate")
    before = [
        replace(accuracy, values={"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}),
        replace(wer, values={"wer": 0.1}),
    ]
    after = [
        replace(accuracy, values={"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95}),
        replace(wer, values={"wer": 0.1}),
    ]
    rows = compare(write(tmp_path / "a", *before), write(tmp_path / "b", *after)).rows
    assert [(row.metric, row.verdict) for row in rows] == [("accuracy", "better"), ("wer", "equal")]


def test_results_without_spread_are_never_called_better(tmp_path: Path) -> None:
    a = write(tmp_path / "a", replace(PREFILL, values={"median_s": 1.0}))
    b = write(tmp_path / "b", replace(PREFILL, values={"median_s": 0.1, "p20_s": 0.1, "p80_s": 0.1}))
    (row,) = compare(a, b).rows
    assert (row.verdict, row.flagged, row.spread_a) == ("no spread", False, None)


def test_outputs_that_no_longer_agree_outweigh_speed(tmp_path: Path) -> None:
    fast = timed(0.1, 0.1, 0.1)
    a = write(tmp_path / "a", timed(1.0, 0.9, 1.1))
    b = write(tmp_path / "b", replace(fast, values=fast.values | {"agrees": False, "reason": "other tokens"}))
    (row,) = compare(a, b).rows
    assert (row.verdict, row.flagged) == ("outputs disagree", True)


def test_what_is_only_in_one_is_listed_and_kinds_never_pair(tmp_path: Path) -> None:
    a = write(tmp_path / "a", timed(1, 1, 1), timed(1, 1, 1, name="encode"))
    b = write(tmp_path / "b", timed(1, 1, 1, kind="projected"), timed(1, 1, 1, name="encode"))
    comparison = compare(a, b)
    assert [row.name for row in comparison.rows] == ["encode"]
    (only_a,), (only_b,) = comparison.only_in_a, comparison.only_in_b
    assert "measured" in only_a
    assert "projected" in only_b
    text = shown(comparison)
    assert text.index("only in A") < text.index(only_a) < text.index("only in B") < text.index(only_b)


def test_the_same_machine_is_not_mentioned_and_another_one_loudly(tmp_path: Path) -> None:
    a = write(tmp_path / "a", timed(1, 1, 1))
    same = compare(a, write(tmp_path / "b", timed(1, 1, 1, machine={**MACHINE, "timestamp": "later"})))
    assert (same.machines, same.other_machine) == ([], False)
    assert "different machines" not in shown(same)
    other = {**MACHINE, "gpu": {"name": "T4", "sm_mhz": 900}, "versions": {"torch": "2.14"}}
    differing = compare(a, write(tmp_path / "b", timed(1, 1, 1, machine=other)))
    assert [difference.field for difference in differing.machines] == ["gpu.name", "gpu.sm_mhz", "versions.torch"]
    assert differing.other_machine
    text = shown(differing)
    assert text.index("different machines") < text.index("T4") < text.index("2.14") < text.index("prefill")


def test_another_version_on_the_same_machine_is_listed_without_alarm(tmp_path: Path) -> None:
    b = write(tmp_path / "b", timed(1, 1, 1, machine={**MACHINE, "versions": {"torch": "2.14"}}))
    comparison = compare(write(tmp_path / "a", timed(1, 1, 1)), b)
    assert not comparison.other_machine
    assert [(d.field, d.a, d.b) for d in comparison.machines] == [("versions.torch", ["2.13"], ["2.14"])]


def test_one_file_of_two_machines_is_said_loudly(tmp_path: Path) -> None:
    mixed = [timed(1, 1, 1), timed(1, 1, 1, name="encode", machine={**MACHINE, "cores": 4})]
    assert compare(write(tmp_path / "a", *mixed), write(tmp_path / "b", *mixed)).other_machine


def test_the_latest_of_repeated_measurements_counts_and_that_is_said(tmp_path: Path) -> None:
    a = write(tmp_path / "a", timed(9, 9, 9), timed(1, 1, 1))
    comparison = compare(a, write(tmp_path / "b", timed(2, 2, 2)))
    assert (comparison.rows[0].ratio, comparison.repeated) == (2, 1)
    assert "1 older" in shown(comparison)


def test_hostile_text_reaches_the_terminal_as_text(tmp_path: Path) -> None:
    evil = timed(1, 1, 1, subject="[red]x[/red] \x1b[2J\x07", case={"[link=http://x]": "\x1b]0;x\x07\ud800"})
    text = shown(compare(write_raw(tmp_path / "a", evil), write_raw(tmp_path / "b", evil)))
    assert "[red]x[/red]" in text
    assert not {"\x1b", "\x07", "\ud800"} & set(text)


def write_raw(path: Path, record: Record) -> Path:
    """Written with escapes, as a file from elsewhere can be: a lone surrogate cannot be encoded otherwise."""
    fields = {name: getattr(record, name) for name in ("bench", "name", "subject", "case", "values", "kind", "machine")}
    path.write_text(json.dumps(fields) + "\n")
    return path


@pytest.mark.parametrize("change", [{"values": [1]}, {"subject": 3}, {"kind": "guessed"}, {"machine": "H100"}])
def test_records_of_the_wrong_shape_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    a = write_raw(tmp_path / "a", replace(PREFILL, **change))
    with pytest.raises(ResultsError, match="record 1"):
        compare(a, a)


@pytest.mark.parametrize("value", [None, "fast", True, float("nan"), 10**400, [1]])
def test_values_that_are_no_numbers_are_passed_over(tmp_path: Path, value: Any) -> None:
    a = write_raw(tmp_path / "a", replace(PREFILL, values={"median_s": value, "tokens_per_s": 2}))
    (row,) = compare(a, a).rows
    assert row.metric == "tokens_per_s"


def test_missing_files_and_empty_ones(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no results"):
        compare(tmp_path / "none", tmp_path / "none")
    empty = write(tmp_path / "empty")
    assert "Nothing was measured in both" in shown(compare(empty, empty))


def test_json_holds_everything(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", timed(1.0, 0.9, 1.1)), write(tmp_path / "b", timed(2.0, 1.9, 2.1))
    plain = json.loads(json.dumps(to_dict(compare(a, b))))
    assert plain["rows"][0]["flagged"] is True
    assert plain["rows"][0]["spread_b"] == [1.9, 2.1]
    assert set(plain) == {"machines", "other_machine", "rows", "only_in_a", "only_in_b", "repeated"}
