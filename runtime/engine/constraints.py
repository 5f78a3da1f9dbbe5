"""Constraints of a request besides sampling: suppressed tokens, bad words, biases, n-grams, a minimal length.

Scores depend only on the sequence's tokens, not on the order of calls, so a token gets the same scores whenever they
are computed: with speculative tokens, or again after preemption. Results equal those of the logits processors of
`transformers`, which are applied in this order: biases, repetition penalty, forbidden tokens.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import SamplingError

if TYPE_CHECKING:
    from .sampler import SamplingParams


class Constraints:
    """The constraints of one sequence. `push` adds its tokens; speculative tokens are passed to each call instead."""

    def __init__(self, params: "SamplingParams", prompt: Sequence[int], vocab_size: int, device: torch.device):
        """Raises SamplingError for a biased token beyond the vocabulary, or when every token is suppressed."""
        self._tokens = list(prompt)
        self._prompt = len(prompt)
        self._params = params
        self._vocab_size = vocab_size
        self._device = device
        ends = {(token,) for token in params.stop_token_ids}
        bad_words = [words for words in params.bad_words_ids if words not in ends]  # an answer can always end
        self._biases = _by_prefix(params.sequence_bias)
        self._bad_words = _by_prefix((words, 0.0) for words in bad_words)
        for token in (token for words, _ in params.sequence_bias for token in words):
            if token >= vocab_size:
                raise SamplingError(f"sequence_bias has the token {token}, and the vocabulary ends at {vocab_size - 1}")
        always = {*params.suppress_tokens, *(word for words in bad_words if len(words) == 1 for word in words)}
        self._always = self._mask(always)
        if bool(self._always.all()):
            raise SamplingError("suppress_tokens and bad_words_ids leave no token to choose; remove some")
        self._single = torch.zeros(vocab_size, device=device)
        for words, bias in params.sequence_bias:
            if len(words) == 1:
                self._single[words[0]] = bias
        self._size = params.no_repeat_ngram_size
        self._followers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for end in range(self._size, len(self._tokens) + 1):
            self._note_ngram(self._tokens[end - self._size : end])

    def push(self, token: int) -> None:
        """Add the sequence's next token."""
        self._tokens.append(token)
        if 0 < self._size <= len(self._tokens):
            self._note_ngram(self._tokens[-self._size :])

    def bias(self, drafted: Sequence[int]) -> Tensor | None:
        """The bias added to the scores after the tokens so far and `drafted`: [vocab] float32, None for no bias."""
        if not self._params.sequence_bias:
            return None
        total = self._single.clone()
        for token, bias in _completions(self._biases, self._recent(self._biases, drafted)):
            total[token] += bias
        return total

    def forbidden(self, drafted: Sequence[int]) -> Tensor:
        """Which tokens may not come after the tokens so far and `drafted`: [vocab] bool."""
        params, length = self._params, len(self._tokens) - self._prompt + len(drafted)
        now = [token for token, _ in _completions(self._bad_words, self._recent(self._bad_words, drafted))]
        if length == 0:
            now += params.begin_suppress_tokens
        if length < params.min_new_tokens:
            now += params.stop_token_ids
        if self._size:
            now += self._repeating(drafted)
        return self._always | self._mask(now) if now else self._always

    def _repeating(self, drafted: Sequence[int]) -> list[int]:
        """The tokens that would complete an n-gram that has already occurred."""
        size = self._size
        recent = [*self._tokens[max(0, len(self._tokens) - size + 1) :], *drafted]
        if len(self._tokens) + len(drafted) < size - 1:
            return []
        start = tuple(recent[len(recent) - size + 1 :])
        ngrams = (tuple(recent[end - size : end]) for end in range(size, len(recent) + 1))  # that end in `drafted`
        return [*self._followers.get(start, ()), *(ngram[-1] for ngram in ngrams if ngram[:-1] == start)]

    def _note_ngram(self, ngram: Sequence[int]) -> None:
        if self._size:
            self._followers[tuple(ngram[:-1])].append(ngram[-1])

    def _recent(self, sequences: "_ByPrefix", drafted: Sequence[int]) -> list[int]:
        """As many of the last tokens as the longest prefix has."""
        longest = max(sequences, default=0)
        return [*self._tokens[-longest:], *drafted][-longest:] if longest else []

    def _mask(self, tokens: Iterable[int]) -> Tensor:
        inside = sorted({token for token in tokens if token < self._vocab_size})
        mask = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
        mask[torch.tensor(inside, dtype=torch.int64, device=self._device)] = True
        return mask


_ByPrefix = dict[int, dict[tuple[int, ...], list[tuple[int, float]]]]


def _by_prefix(sequences: Iterable[tuple[tuple[int, ...], float]]) -> _ByPrefix:
    """Maps the length of each sequence without its last token, then those tokens, to the last token and its value.

    Sequences have at least two tokens; of equal sequences the last counts.
    """
    grouped: _ByPrefix = {}
    for tokens, value in dict(sequences).items():
        if len(tokens) > 1:
            grouped.setdefault(len(tokens) - 1, {}).setdefault(tokens[:-1], []).append((tokens[-1], value))
    return grouped


def _completions(sequences: _ByPrefix, recent: Sequence[int]) -> Iterable[tuple[int, float]]:
    """The last tokens, with their values, of the sequences whose other tokens `recent` ends with."""
    for length, by_prefix in sequences.items():
        if length <= len(recent):
            yield from by_prefix.get(tuple(recent[len(recent) - length :]), ())
