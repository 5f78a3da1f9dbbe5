"""Degenerate repetition: an answer that says the same few tokens again and again."""

from dataclasses import dataclass

import numpy as np

LONGEST = 64  # period that is looked for
REPEATS = 4  # after which a period counts
TOKENS = 32  # and how many tokens the repeats must be at least


@dataclass(frozen=True)
class Repetition:
    """The answer's tokens from `start` on are one stretch of `period` tokens, said `repeats` times."""

    start: int
    period: int
    repeats: int


class RepetitionGuard:
    """Watches an answer token by token. `found` is the latest repetition, as far as it went, or None."""

    def __init__(self) -> None:
        self.found: Repetition | None = None
        self._recent = np.full(LONGEST, -1)  # the newest token first
        self._runs = np.zeros(LONGEST, np.int64)  # tokens in a row that equal the one `period` before them
        self._count = 0
        self._needed = np.maximum(REPEATS * np.arange(1, LONGEST + 1), TOKENS)

    def push(self, token: int) -> bool:
        """Take in the next token. Returns whether the answer is repeating itself now."""
        self._runs = np.where(self._recent == token, self._runs + 1, 0)
        self._recent = np.concatenate([[token], self._recent[:-1]])
        self._count += 1
        said = self._runs + np.arange(1, LONGEST + 1)
        enough = said >= self._needed
        if not enough.any():
            return False
        period = int(enough.argmax()) + 1
        length = int(said[period - 1])
        self.found = Repetition(self._count - length, period, length // period)
        return True
