"""Control characters made visible, and options as the command line spells them."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afnext.runtime.app.cli.text import command_line_spelling, encodable, json_text, visible, visible_line


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    assert not any(unicodedata.category(character) == "Cc" for character in visible_line(text))
    kept = visible(text, keep="\n\t")
    assert {character for character in kept if unicodedata.category(character) == "Cc"} <= {"\n", "\t"}
    assert kept.count("\n") == text.count("\n")


@given(st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs"])))
def test_what_can_be_printed_stays(text: str) -> None:
    assert visible(text) == visible_line(text) == text


def test_control_characters_are_escaped() -> None:
    assert visible_line("a\x1b]0;x\x07\r\n\x9b\u202eb") == r"a\x1b]0;x\x07\r\n\x9b\u202eb"
    assert visible("\u202eשלום\u202c") == "\u202eשלום\u202c", "answers may set the direction of their text"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8"])
def test_every_encoding_can_hold_text_and_json(encoding: str) -> None:
    value = {"text": "“Grüße” 你好 🎵 \udcff"}
    assert json.loads(json_text(value, encoding).encode(encoding).decode(encoding)) == value
    shown = encodable(value["text"], encoding)
    assert shown.encode(encoding)
    assert r"\udcff" in shown
    assert ("🎵" in shown) == (encoding == "utf-8")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("pass truncate=True to use the first 30 s.", "pass --truncate to use the first 30 s."),
        ("Shorten the prompt or lower max_new_tokens.", "Shorten the prompt or lower --max-new-tokens."),
        ("Use chunk_size=256, encode_batch=1, kv=int8.", "Use --chunk-size 256, --encode-batch 1, --kv int8."),
        ('load with memory="8GB" or quant=int4-w4a8', "load with --memory 8GB or --quant int4-w4a8"),
        ("top_p is 2; it must be above 0", "--top-p is 2; it must be above 0"),
        ("It fits with encode_ahead=False", "It fits with --no-encode-ahead"),
        ("release_encoder frees 2 GB", "--release-encoder frees 2 GB"),
        ("the device has no memory, leave revision out", "the device has no memory, leave revision out"),
        ("a/max_new_tokens/top_k.wav is bad", "a/max_new_tokens/top_k.wav is bad"),
        ("top_k.wav: my_top_p min_ps", "top_k.wav: my_top_p min_ps"),
    ],
)
def test_options_are_named_as_the_command_line_spells_them(message: str, expected: str) -> None:
    assert command_line_spelling(message) == expected
