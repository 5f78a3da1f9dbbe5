"""The decode runner: one decode step for a batch of sequences, with speculative tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.row_groups import is_row_invariant, row_invariant
from .decode_steps import MAX_SPECULATING
from .executor import Executor
from .options import EngineOptions
from .request import SequenceState
from .sampler import choose, log_probabilities


@dataclass(frozen=True)
class Decoded:
    """What a step computed for one sequence.

    tokens: the tokens chosen after the last one and after each speculative token, None where the scores are not finite;
    logprobs: of `tokens`, if the request asks for them; speculative: the speculative tokens.
    """

    tokens: list[int | None]
    logprobs: list[float]
    speculative: list[int]

    @property
    def accepted(self) -> int:
        """Number of speculative tokens that were accepted."""
        pairs = zip(self.tokens, self.speculative, strict=False)
        return next((index for index, (token, guess) in enumerate(pairs) if token != guess), len(self.speculative))


class DecodeRunner:
    """Computes the next tokens of sequences. It writes to their pages and changes no other state of theirs."""

    def __init__(self, executor: Executor, options: EngineOptions):
        self._executor = executor
        self._options = options

    def first(self, sequence: SequenceState, hidden: Tensor) -> Decoded:
        """Choose the first token from the hidden states of the end of the prompt, [1, tokens, hidden]."""
        assert sequence.sampler is not None
        logits = self._executor.logits(hidden[:, -1])
        tokens = choose(logits, [sequence.sampler], [0])
        return Decoded(tokens, _logprobs(logits, tokens) if sequence.request.logprobs else [], [])

    def decode(self, sequences: list[SequenceState]) -> list[Decoded]:
        """Decode the newest token of each sequence, and speculative tokens after it, in one pass."""
        guesses = self._speculative(sequences)
        if self._options.batch_invariant:
            return self._decode_rows(sequences, guesses)
        time = 1 + max(map(len, guesses))
        pages = [sequence.pages for sequence in sequences]
        # Padding after fewer speculative tokens is computed and ignored; later tokens overwrite it in the pages.
        tokens = [
            [s.tokens[-1], *guess, *[0] * (time - 1 - len(guess))] for s, guess in zip(sequences, guesses, strict=True)
        ]
        logits = self._executor.decode(tokens, [s.computed for s in sequences], pages)
        rows = [(row, at) for row, guess in enumerate(guesses) for at in range(1 + len(guess))]
        return _chosen(sequences, guesses, logits[[row for row, _ in rows], [at for _, at in rows]])

    def _decode_rows(self, sequences: list[SequenceState], guesses: list[list[int]]) -> list[Decoded]:
        """Like `decode`, with every token in a separate row, as a sequence with one new token."""
        with row_invariant():
            logits = self._rows(
                [[s.tokens[-1], *guess] for s, guess in zip(sequences, guesses, strict=True)],
                [s.computed for s in sequences],
                [s.pages for s in sequences],
            )
            return _chosen(sequences, guesses, logits)

    def replay(self, sequence: SequenceState, count: int) -> None:
        """Recompute the keys and values of the next `count` tokens of an answer, with the same bits as before."""
        first = sequence.computed - len(sequence.request.token_ids)
        with row_invariant():
            self._rows([sequence.tokens[first : first + count]], [sequence.computed], [sequence.pages])

    def _rows(self, tokens: list[list[int]], positions: list[int], pages: list[list[int]]) -> Tensor:
        """Decode the newest tokens of each sequence at the given positions. Returns [all tokens, vocab] float32."""
        rows = [(row, at) for row, newest in enumerate(tokens) for at in range(len(newest))]
        newest = [[tokens[row][at]] for row, at in rows]
        starts = [positions[row] + at for row, at in rows]
        return self._executor.decode(newest, starts, [pages[row] for row, _ in rows])[:, 0]

    def _speculative(self, sequences: list[SequenceState]) -> list[list[int]]:
        """Speculative tokens of each sequence; none if many are decoded at once, because a large batch gains
        nothing."""
        most = self._options.draft_tokens
        for sequence in sequences:  # padding needs room in the pages, too
            most = min(most, len(sequence.pages) * self._options.page_size - sequence.computed - 1)
        if most < 1 or len(sequences) > MAX_SPECULATING:
            return [[] for _ in sequences]
        guesses = []
        for sequence in sequences:
            assert sequence.request.sampling is not None
            room = sequence.request.sampling.max_new_tokens - len(sequence.tokens) - 1
            guesses.append([] if sequence.drafter is None else sequence.drafter.draft(min(most, room)))
        return guesses


def _chosen(sequences: list[SequenceState], guesses: list[list[int]], scores: Tensor) -> list[Decoded]:
    """The decoded tokens of each sequence, given the scores after its newest token and each guess, one per row."""
    rows = [(row, at) for row, guess in enumerate(guesses) for at in range(1 + len(guess))]
    chosen = choose(
        scores,
        [sampler for row, _ in rows if (sampler := sequences[row].sampler) is not None],
        [len(sequences[row].tokens) + at for row, at in rows],
        [guesses[row][:at] for row, at in rows],
    )
    decoded, end = [], 0
    for sequence, guess in zip(sequences, guesses, strict=True):
        start, end = end, end + 1 + len(guess)
        ours = chosen[start:end]
        logprobs = _logprobs(scores[start:end], ours) if sequence.request.logprobs else []
        decoded.append(Decoded(ours, logprobs, guess))
    return decoded


def _logprobs(logits: Tensor, tokens: list[int | None]) -> list[float]:
    chosen = torch.tensor([token or 0 for token in tokens], device=logits.device)
    if not is_row_invariant():
        return log_probabilities(logits, chosen)
    # torch may divide the sum over one row's vocabulary among threads.
    pairs = zip(logits.split(1), chosen.split(1), strict=True)
    return [value for row, token in pairs for value in log_probabilities(row, token)]
