"""Speculative tokens by prompt lookup: what followed an earlier occurrence of the last tokens is likely to follow
again.

Drafts cost almost nothing, and one pass through the decoder verifies them: the scores after each speculative token give
the token that would have been chosen there, with the same penalties and random number. Tokens are accepted as long as
draft and choice agree, followed by the first choice that differs, so answers are the same as without drafts. If drafts
are rarely right, drafting pauses.

Source: Saxena 2023, "Prompt Lookup Decoding"; verification as in Leviathan et al. 2023, arXiv:2211.17192, for a draft
that is certain of its tokens.
"""

_LENGTHS = (3, 2)  # numbers of last tokens that are looked up, the longest first
_PAUSE = 24  # tokens without drafts after too many wrong drafts
_ENOUGH = 0.25  # share of the drafted tokens that must be right
_MEMORY = 0.8  # weight of the past in that share


class Drafter:
    """Drafts the continuation of one sequence."""

    def __init__(self, token_ids: list[int]):
        """token_ids: the prompt, without the placeholders of audio."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._share = 1.0
        self._pause = 0
        for token in token_ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Add the sequence's next token."""
        for length in _LENGTHS:
            if len(self._tokens) >= length:
                self._after[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)
        self._pause = max(0, self._pause - 1)

    def draft(self, count: int) -> list[int]:
        """Up to `count` speculative tokens; none if nothing is found or drafting pauses."""
        if self._pause:
            return []
        for length in _LENGTHS:
            start = self._after.get(tuple(self._tokens[-length:]))
            if start is not None:
                return self._tokens[start : start + count]
        return []

    def record(self, drafted: int, right: int) -> None:
        """Record how many of the drafted tokens were right."""
        if drafted:
            self._share = _MEMORY * self._share + (1 - _MEMORY) * right / drafted
            if self._share < _ENOUGH:
                self._share, self._pause = 2 * _ENOUGH, _PAUSE
