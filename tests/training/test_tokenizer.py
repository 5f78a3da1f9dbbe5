"""The tokenizer keeps any text, and spends one token on each piece that the model says."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afnext.bench.core.random_checkpoint import SPECIAL_TOKENS
from training import vocabulary
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
plain = st.text().map(lambda text: unicodedata.normalize("NFC", text))


@given(plain.filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("word", [*vocabulary.WORDS, *vocabulary.SOUNDS, *vocabulary.PLURALS.values()])
def test_a_known_word_is_one_token(word: str) -> None:
    assert len(TOKENIZER.encode(f" {word}").ids) == 1


def test_a_timestamp_is_three_tokens() -> None:
    assert TOKENIZER.encode("[29:59.9]").tokens == ["[29:", "59", ".9]"]


def test_special_tokens_are_there() -> None:
    assert all(TOKENIZER.token_to_id(token) is not None for token in SPECIAL_TOKENS)
