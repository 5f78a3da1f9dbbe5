"""The kind of each token: a number, a word, or neither."""

import re

import numpy as np
import numpy.typing as npt

from ..engine.repetition import NUMBER, OTHER, WORD
from ..io.tokenizer import BYTE_OF_SYMBOL, Tokenizer

_SPACE = next(symbol for symbol, byte in BYTE_OF_SYMBOL.items() if byte == 0x20)
# A word has a Latin letter or part of a non-ASCII character, which most likely is a letter.
_LETTERS = "".join(symbol for symbol, byte in BYTE_OF_SYMBOL.items() if byte >= 0x80 or chr(byte).isalpha())
_NUMBER = re.compile(rf"{_SPACE}?[0-9]+")
_WORD = re.compile(f"[{re.escape(_LETTERS)}]")


def token_kinds(tokenizer: Tokenizer) -> npt.NDArray[np.uint8]:
    """NUMBER, WORD or OTHER for each id of the vocabulary, [vocab_size]. Added tokens are OTHER."""
    kinds = np.full(tokenizer.vocab_size, OTHER, np.uint8)
    added = set(tokenizer.added_tokens.values())
    for token in range(tokenizer.vocab_size):
        spelling = None if token in added else tokenizer.spelling(token)
        if spelling is not None:
            kinds[token] = NUMBER if _NUMBER.fullmatch(spelling) else WORD if _WORD.search(spelling) else OTHER
    return kinds
