"""Degenerate repetition: an answer that repeats itself, exactly or with other numbers.

Two kinds are detected: a run of tokens that repeats token by token, and one in which only numbers differ, as in a loop
whose time stamps or item numbers count up. For the second kind each number is one unit, however many digits it has, and
the run must contain a word: `1, 2, 3, ...` is counting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LONGEST = 512  # longest period that is detected
REPEATS = 4  # repeats after which a period counts
COUNTING_REPEATS = 6  # and where numbers differ, as they do in real lists
TOKENS = 32  # minimal length of the repeats in tokens or units
OTHER, NUMBER, WORD = 0, 1, 2  # kinds of tokens


@dataclass(frozen=True)
class Repetition:
    """The answer's tokens from `start` on are one run of `period` tokens, repeated `repeats` times.

    If numbers differ, possibly in length, `period` is that of the last repeat.
    """

    start: int
    period: int
    repeats: int


class _Runs:
    """For each period, how many items in a row equal the one `period` before them."""

    def __init__(self, repeats: int) -> None:
        self.count = 0
        self._recent = np.full(LONGEST, -2)  # the newest item first
        self._runs = np.zeros(LONGEST, np.int64)
        periods = np.arange(1, LONGEST + 1)
        self._needed = np.maximum(repeats * periods, TOKENS) - periods

    def push(self, item: int) -> tuple[int, int] | None:
        """Add the next item. Returns the smallest period that counts now and the items that it covers, if any."""
        self._runs += 1
        self._runs[self._recent != item] = 0
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = item
        self.count += 1
        enough = self._runs >= self._needed
        at = int(enough.argmax())
        return (at + 1, int(self._runs[at]) + at + 1) if enough[at] else None


class RepetitionGuard:
    """Checks an answer token by token. `found` is the latest repetition in its full length, or None."""

    def __init__(self, kinds: npt.NDArray[np.uint8] | Sequence[int] | None = None) -> None:
        """kinds: [vocabulary], NUMBER, WORD or OTHER for each token; without it only exact repeats are found."""
        self.found: Repetition | None = None
        self._kinds = kinds
        self._tokens = _Runs(REPEATS)
        self._units = _Runs(COUNTING_REPEATS)
        self._starts: list[int] = []  # token at which each unit begins
        self._words = [0]  # how many of the units before each one are words
        self._after_number = False
        self._counting: tuple[int, int] | None = None

    def push(self, token: int) -> bool:
        """Add the next token. Returns whether the answer is repeating itself now."""
        exact = self._tokens.push(token)
        if self._kinds is not None:
            self._push_unit(token, int(self._kinds[token]) if token < len(self._kinds) else OTHER)
        if exact is not None:
            period, length = exact
            self.found = Repetition(self._tokens.count - length, period, length // period)
        elif self._counting is not None:
            period, length = self._counting
            start, last = self._starts[self._units.count - length], self._starts[self._units.count - period]
            self.found = Repetition(start, self._tokens.count - last, length // period)
        return exact is not None or self._counting is not None

    def _push_unit(self, token: int, kind: int) -> None:
        if kind == NUMBER and self._after_number:
            return
        self._after_number = kind == NUMBER
        self._starts.append(self._tokens.count - 1)
        self._words.append(self._words[-1] + (kind == WORD))
        self._counting = self._units.push(-1 if kind == NUMBER else token)
        if self._counting is not None:
            period, _ = self._counting
            if self._words[-1] == self._words[-1 - period]:
                self._counting = None
