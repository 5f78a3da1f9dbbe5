"""The scores of the evaluation, on answers whose worth is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import evaluate
from training.evaluate import Clip, Row, _alike, _first_error, listed, long_row, long_rows, matched, seconds, table
from training.scenes import Item, Question, lines, timestamp
from training.voices import voices

EXPECTED = [(1.0, "beep"), (2.0, "beep"), (5.5, "seven")]


def test_lines_are_read_back() -> None:
    items = [Item("beep", False, 1.03, 1.2), Item("seven", True, 605.5, 606)]
    for numbered in (False, True):
        assert listed(lines(items, quoted=True, numbered=numbered)) == [(1.0, "beep"), (605.5, "seven")]
    assert listed("[00:01.0] beep\nnonsense\n[0:1] x") == [(1.0, "beep")]


def test_each_expected_event_is_found_once() -> None:
    assert matched(EXPECTED, EXPECTED) == [0, 0, 0]
    assert matched(EXPECTED, [(1.9, "beep"), (9.0, "beep"), (1.0, "seven")]) == pytest.approx([0.1, 4.5, 8.0])
    assert matched(EXPECTED, [(1.0, "siren")]) == []


@given(st.permutations(EXPECTED))
def test_order_does_not_matter(found: list[tuple[float, str]]) -> None:
    assert matched(EXPECTED, found) == [0, 0, 0]


@pytest.mark.parametrize(
    ("said", "alike"),
    [
        ("A beep at 00:01.4.", True),
        ("A beep at 00:01.6.", False),
        ("A bell at 00:01.0.", False),
        ("A beep at 00:01.0", False),
        ("", False),
    ],
)
def test_an_answer_is_right_if_words_agree_and_times_are_near(said: str, alike: bool) -> None:
    assert _alike("A beep at 00:01.0.", said) is alike


@pytest.mark.parametrize(
    ("said", "right"), [("1 at 00:01.0, 2 at 00:09.9: 2", 1), ("2", 1), ("1 at 00:01.0: 1", 0), ("", 0)]
)
def test_a_count_is_right_if_it_ends_in_the_number(said: str, right: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Clip(np.zeros(1), [], Question("count_sound", "", "1 at 00:01.0, 2 at 00:03.0: 2"))
    answer = SimpleNamespace(text=said, finish_reason="stop")
    monkeypatch.setattr(evaluate, "answers", lambda *_: [(clip, answer)])
    row = evaluate._counts(None, [clip], "counting")  # type: ignore[arg-type]
    assert (row.values, row.stopped) == ({"accuracy": right}, 1)


def test_the_first_time_said_counts_and_none_is_the_worst() -> None:
    assert _first_error(61.27, "01:01.2") == 0
    assert _first_error(61.27, "00:59.2, 01:01.2") == pytest.approx(2.0)
    assert _first_error(61.27, "It does not occur.") == 1800


def test_thirty_minutes_are_scored_by_moments_and_by_the_list() -> None:
    def asked(at: float, said: str) -> tuple[Clip, Any]:
        question = Question("when", "", f"A beep at {timestamp(at)}.", [Item("beep", False, at, at + 0.2)])
        return Clip(np.zeros(1), [], question), SimpleNamespace(text=said, finish_reason="stop")

    first = ([asked(61.0, "A beep at 01:01.2.")], [(61.0, "beep")], [(61.2, "beep")])
    second = ([asked(1000.0, "No.")], [(1000.0, "beep"), (1100.0, "siren")], [])
    row = long_row("when", [first, second])
    assert (row.clips, row.stopped, row.values["accuracy"]) == (2, 2, 0.5)
    assert row.values["median error, s"] == pytest.approx((0.2 + 1800) / 2)
    assert row.values["F1 of the list"] == pytest.approx(2 / 4)
    tenths = long_rows([first, second])
    assert [tenth.clips for tenth in tenths] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert [tenth.values["F1 of the list"] for tenth in tenths] == [1.0, *[0.0] * 9]


def test_timestamps_are_seconds() -> None:
    assert seconds("29:59.9") == pytest.approx(1799.9)


def test_the_table_has_a_line_a_row() -> None:
    rows = [Row("words", 10, {"word error rate": 0.051}, 10), Row("times", 9, {"median error, s": 0.04}, 9)]
    text = table(rows)
    assert "| words | 10 | 5.1 % |  | 10 |" in text
    assert "| times | 9 |  | 0.04 | 9 |" in text


def test_held_out_voices_are_not_trained_on() -> None:
    trained, held_out = ({(voice.engine, voice.name) for voice in voices(0, 300, split)} for split in (False, True))
    assert not trained & held_out
    parts = [{part for _, name in names for part in name.split("+")[1:]} for names in (trained, held_out)]
    assert not parts[0] & parts[1]
