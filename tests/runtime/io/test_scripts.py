"""Text of scripts without spaces between words: what its units are, and how pieces of it are joined."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afnext.runtime.app.openai_format import plain_text
from afnext.runtime.io.scripts import continued, joined, units
from afnext.runtime.io.segments import Segment


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["hello", "there"], "hello there"),
        (["今天", "天气很好。", "我们走吧"], "今天天气很好。我们走吧"),
        (["今日は", "「いい」", "天気"], "今日は「いい」天気"),
        (["ｶﾀｶﾅ", "、", "漢字"], "ｶﾀｶﾅ、漢字"),
        (["我用", "Python", "写程序"], "我用 Python 写程序"),
        (["สวัสดี", "ครับ"], "สวัสดี ครับ"),
        (["안녕", "하세요"], "안녕 하세요"),
        (["", "one", "", "two"], "one two"),
        ([], ""),
    ],
)
def test_pieces_are_joined_as_the_script_is_written(pieces: list[str], text: str) -> None:
    assert joined(pieces) == text


@given(st.lists(st.text("ab 今天。", max_size=3), max_size=8))
def test_a_stream_of_pieces_is_their_whole(pieces: list[str]) -> None:
    text = ""
    for piece in pieces:
        text += continued(text, piece)
    assert text == joined(pieces)


def test_plain_text_is_written_as_its_script_is() -> None:
    segments = [Segment(start=0.0, end=1.0, text="今天天气很好。"), Segment(start=1.0, end=2.0, text="我们走吧")]
    assert plain_text(segments) == "今天天气很好。我们走吧"


def test_units_are_words_or_letters() -> None:
    assert units("Hello, World-2!") == ["hello", "world", "2"]
    assert units("我用Python写。") == ["我", "用", "python", "写"]
    assert units("กี่") == list("กี่")
    assert units("안녕 하세요") == ["안녕", "하세요"]
    assert units("...") == []
