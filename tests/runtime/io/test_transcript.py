"""Cutting thinking from the answer, whole and streamed."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from afnext.runtime.io.transcript import ThinkingSplitter, split_thinking

CASES = [
    ("just an answer", None, "just an answer"),
    ("  padded \n", None, "padded"),
    ("", None, ""),
    ("<think>\nreason\n</think>\n\nanswer\n", "reason", "answer"),
    ("\n <think> a </think>b", "a", "b"),
    ("<think></think>b", "", "b"),
    ("<think>a</think>", "a", ""),
    ("<think>cut off by leng", "cut off by leng", ""),
    ("<think>cut off in the tag </thi", "cut off in the tag </thi", ""),
    ("<think>", "", ""),
    ("<thi", None, "<thi"),
    ("opened by the prompt\n</think>\nanswer", "opened by the prompt", "answer"),
    ("</think>answer", "", "answer"),
    ("<think>a <think>b</think> c</think> d", "a <think>b", "c</think> d"),
    ("<think>a</think>b<think>c</think>d", "a", "b<think>c</think>d"),
    ("First <think>a</think> b", None, "First <think>a</think> b"),
    ("First <think>a", None, "First <think>a"),
    ("<thinking>a</thinking>", None, "<thinking>a</thinking>"),
    ("<think>1 < 2 </b> </ think></think>c", "1 < 2 </b> </ think>", "c"),
    ("<think>para\n\n  two\t</think>  line\n\n  two ", "para\n\n  two", "line\n\n  two"),
]


@pytest.mark.parametrize(("text", "thinking", "answer"), CASES)
def test_cases(text, thinking, answer):
    assert split_thinking(text) == (thinking, answer)


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("no closing tag", "no closing tag", ""),
        ("a</think>b", "a", "b"),
        ("<think>a</think>b", "a", "b"),
        ("", "", ""),
        ("<thi", "<thi", ""),
        ("a <think> b</think> c", "a <think> b", "c"),
    ],
)
def test_thinking_that_the_prompt_opened(text, thinking, answer):
    assert split_thinking(text, opened=True) == (thinking, answer)


def test_a_closing_tag_is_text_when_the_prompt_opened_nothing():
    assert split_thinking("a</think>b", opened=False) == (None, "a</think>b")


def expected(text: str, opened: bool) -> tuple[str | None, str]:
    """The rules again, by string methods on the whole text."""
    body = text.strip()
    if not opened and not body.startswith("<think>"):
        return None, body
    thinking, _, answer = body.removeprefix("<think>").partition("</think>")
    return thinking.strip(), answer.strip()


fragments = st.sampled_from(
    ["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "word ", "</thin", "<|im_end|>"]
)
texts = st.lists(st.one_of(fragments, st.text(max_size=3)), max_size=12).map("".join)


@given(texts, st.booleans(), st.data())
@example("  <think> a </think> b ", False, None)
def test_streams_in_any_pieces_give_the_whole_cut(text, opened, data):
    cuts = range(len(text) + 1) if data is None else sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    bounds = [0, *cuts, len(text)]
    splitter = ThinkingSplitter(opened=opened)
    given_out = [given for a, b in pairwise(bounds) for given in splitter.push(text[a:b])]
    given_out += splitter.finish()
    thinking = "".join(piece for part, piece in given_out if part == "thinking")
    answer = "".join(piece for part, piece in given_out if part == "answer")
    assert (thinking if splitter.thought else None, answer) == expected(text, opened)
    assert split_thinking(text, opened=opened) == expected(text, opened)
    assert all(piece for _, piece in given_out)
    parts = [part for part, _ in given_out]
    assert parts == sorted(parts, key=["thinking", "answer"].index)


def test_a_stream_gives_text_out_as_soon_as_it_cannot_be_a_tag():
    splitter = ThinkingSplitter()
    assert splitter.push("<thi") == []
    assert splitter.push("nk>first") == [("thinking", "first")]
    assert splitter.push(" and </") == [("thinking", " and")]
    assert splitter.push("b") == [("thinking", " </b")]
    assert splitter.push(" second </thin") == [("thinking", " second")]
    assert splitter.push("k>\n\nanswer ") == [("answer", "answer")]
    assert splitter.push("on </think>") == [("answer", " on </think>")]
    assert splitter.push("\n") == []
    assert splitter.finish() == []
