"""Chooses the next token of each sequence by the sequence's own parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.sampling import SamplingRows, greedy, penalize, sample
from ..errors import SamplingError
from ..files import shown
from ..values import LARGEST_FLOAT32, SMALLEST_FLOAT32, flag, real, whole
from .constraints import Constraints

MOST_TOKENS = 2**31 - 1
MOST_PENALTY = 1e6  # the inverse is the minimum, so that scores do not overflow float32
MOST_BIAS = 1e30
MOST_SEQUENCES, MOST_SEQUENCE = 10_000, 256  # sequences of bad words or biases, and tokens in one


@dataclass(frozen=True)
class SamplingParams:
    """Parameters for choosing a request's tokens. The default is greedy.

    max_new_tokens: upper bound of the answer's length; temperature: 0 for greedy; top_k: 0 for all tokens; top_p in
    (0, 1]; min_p in [0, 1]; repetition_penalty: 1 for none; seed: reproduces a sampled answer, None for a random one;
    stop_token_ids: any of these ends the answer, as its last token; stop_repetition: end the answer when it repeats
    itself (see `repetition.py`).

    min_new_tokens: tokens before a stop token may be chosen; no_repeat_ngram_size: no n-gram of this size occurs twice
    in prompt and answer, 0 for no such rule; suppress_tokens: never chosen; begin_suppress_tokens: not chosen as the
    first token; bad_words_ids: sequences that are never completed; sequence_bias: (sequence, number) pairs, the number
    added to the score of the token that completes the sequence. If no token is allowed, a stop token ends the answer.

    Numbers may be Python's or numpy's and are stored as Python's. Raises SamplingError for values of another type, out
    of range, or out of float32's range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_repetition: bool = False
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()

    def __post_init__(self) -> None:
        self._set("max_new_tokens", whole, least=1, most=MOST_TOKENS)
        self._set("temperature", _temperature)
        self._set("top_k", whole, least=0, most=MOST_TOKENS)
        self._set("top_p", _in_range, SMALLEST_FLOAT32, 1, "above 0 and at most 1")
        self._set("min_p", _in_range, 0, 1, "between 0 and 1")
        self._set("repetition_penalty", _in_range, 1 / MOST_PENALTY, MOST_PENALTY, "between 0.000001 and 1,000,000")
        if self.seed is not None:
            self._set("seed", whole)
        self._set("stop_repetition", flag)
        self._set("min_new_tokens", whole, least=0, most=MOST_TOKENS)
        self._set("no_repeat_ngram_size", whole, least=0, most=MOST_SEQUENCE)
        for name in ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens"):
            self._set(name, _tokens)
        self._set("bad_words_ids", _sequences)
        self._set("sequence_bias", _biases)

    def _set(self, name: str, convert: Any, *limits: Any, **named_limits: Any) -> None:
        object.__setattr__(self, name, convert(name, getattr(self, name), SamplingError, *limits, **named_limits))

    @property
    def constrained(self) -> bool:
        """Whether `Constraints` has anything to do."""
        tokens = self.suppress_tokens or self.begin_suppress_tokens or self.bad_words_ids or self.sequence_bias
        return bool(tokens) or self.no_repeat_ngram_size > 0 or (self.min_new_tokens > 0 and bool(self.stop_token_ids))


def _in_range(name: str, value: Any, error: type[SamplingError], least: float, most: float, allowed: str) -> float:
    number = real(name, value, error, allowed)
    if not least <= number <= most:
        raise error(f"{name} is {shown(value)}; it must be {allowed}")
    return number


def _temperature(name: str, value: Any, error: type[SamplingError]) -> float:
    allowed = f"0 (greedy) or a number from {SMALLEST_FLOAT32:.2g} to {LARGEST_FLOAT32:.2g}"
    number = real(name, value, error, allowed)
    if number != 0 and number < SMALLEST_FLOAT32:
        raise error(f"{name} is {shown(value)}; it must be {allowed}")
    return number


def _tokens(name: str, value: Any, error: type[SamplingError]) -> tuple[int, ...]:
    return tuple(whole(f"a token of {name}", token, error, least=0) for token in _items(name, value, error))


def _sequences(name: str, value: Any, error: type[SamplingError]) -> tuple[tuple[int, ...], ...]:
    sequences = tuple(_tokens(name, sequence, error) for sequence in _items(name, value, error))
    if len(sequences) > MOST_SEQUENCES or not all(0 < len(sequence) <= MOST_SEQUENCE for sequence in sequences):
        raise error(f"{name} takes up to {MOST_SEQUENCES:,} sequences of 1 to {MOST_SEQUENCE} tokens each")
    return sequences


def _biases(name: str, value: Any, error: type[SamplingError]) -> tuple[tuple[tuple[int, ...], float], ...]:
    pairs = [_items(name, pair, error) for pair in _items(name, value, error)]
    if any(len(pair) != 2 for pair in pairs):
        raise error(f"{name} takes pairs of a sequence of tokens and a number")
    sequences = _sequences(name, [sequence for sequence, _ in pairs], error)
    allowed = f"at most {MOST_BIAS:g}"
    biases = [real(f"a bias of {name}", bias, error, allowed) for _, bias in pairs]
    if any(bias > MOST_BIAS for bias in biases):
        raise error(f"a bias of {name} is {max(biases)}; it must be {allowed}")
    return tuple(zip(sequences, biases, strict=True))


def _items(name: str, value: Any, error: type[SamplingError]) -> list[Any]:
    try:
        if not isinstance(value, str | bytes | Mapping):
            return list(value)
    except TypeError:
        pass  # not iterable
    raise error(f"{name} is {shown(value)}; it must be a list or tuple")


class Sampler:
    """Chooses the tokens of one sequence and records the tokens seen.

    The i-th token of a sampled answer is drawn with the i-th number of the sequence's own generator, so the draw
    depends on the seed only, not on other sequences in the batch or on how often a token's scores were computed.
    """

    def __init__(self, params: SamplingParams, prompt: list[int], vocab_size: int, device: torch.device):
        """Raises SamplingError if the parameters do not fit the vocabulary."""
        self.params = params
        self.seen: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, dtype=torch.int64, device=device)] = True
        self.constraints = Constraints(params, prompt, vocab_size, device) if params.constrained else None
        self._uniform: list[float] = []
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed % 2**63)

    def uniform(self, index: int) -> float:
        """The number in [0, 1) that the answer's token `index` is drawn with."""
        while len(self._uniform) <= index:
            self._uniform.append(torch.rand(1, generator=self._generator).item())
        return self._uniform[index]

    def accept(self, token: int) -> None:
        """Record that `token` is now part of the sequence."""
        if self.seen is not None:
            self.seen[token] = True
        if self.constraints is not None:
            self.constraints.push(token)


def choose(
    logits: Tensor, samplers: list[Sampler], indices: list[int], drafted: list[list[int]] | None = None
) -> list[int | None]:
    """The next token of each of several sequences, or of one sequence after several speculative tokens.

    logits: [len(samplers), vocab] float32; indices: number of tokens in each answer so far; drafted: the speculative
    ones among them, which the sampler has not recorded. Returns None for a row whose largest score is NaN or infinite.
    """
    supposed = drafted or [[] for _ in samplers]
    logits = _biased(logits, samplers, supposed)
    if any(sampler.seen is not None for sampler in samplers):
        nothing = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        seen = torch.stack([nothing if sampler.seen is None else sampler.seen for sampler in samplers])
        for row, tokens in enumerate(supposed):
            seen[row, tokens] = True
        penalty = [sampler.params.repetition_penalty for sampler in samplers]
        logits = penalize(logits, seen, torch.tensor(penalty, dtype=torch.float32, device=logits.device))
    logits = _allowed(logits, samplers, supposed)
    chosen = greedy(logits)
    largest = logits.gather(1, chosen[:, None])[:, 0]
    sampled = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    if sampled:
        uniform = torch.tensor(
            [samplers[row].uniform(indices[row]) for row in sampled], dtype=torch.float32, device=logits.device
        )
        chosen[sampled] = sample(logits[sampled], _filters([samplers[row].params for row in sampled], logits), uniform)
    # One copy from the device. The difference is NaN, hence not 0, for NaN and for infinity.
    tokens = torch.where(largest - largest == 0, chosen, -1).tolist()
    return [token if token >= 0 else None for token in tokens]


def log_probabilities(logits: Tensor, tokens: Tensor) -> list[float]:
    """Log probabilities of one token per row. logits: [rows, vocab] float32; tokens: [rows] int64."""
    return (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)).tolist()


def _biased(logits: Tensor, samplers: list[Sampler], drafted: list[list[int]]) -> Tensor:
    """The logits plus each row's biases."""
    biases = {
        row: bias
        for row, sampler in enumerate(samplers)
        if sampler.constraints is not None and (bias := sampler.constraints.bias(drafted[row])) is not None
    }
    if biases:
        logits = logits.clone()
        for row, bias in biases.items():
            logits[row] += bias
    return logits


def _allowed(logits: Tensor, samplers: list[Sampler], drafted: list[list[int]]) -> Tensor:
    """The logits with -inf for the tokens that each row's constraints forbid; if all are forbidden, stop tokens
    remain."""
    rows = [(row, sampler.constraints) for row, sampler in enumerate(samplers) if sampler.constraints is not None]
    if rows:
        logits = logits.clone()
    for row, constraints in rows:
        masked = logits[row].masked_fill(constraints.forbidden(drafted[row]), -torch.inf)
        nothing_left = (masked.amax() == -torch.inf) & (logits[row].amax() > -torch.inf)
        remaining = list(samplers[row].params.stop_token_ids[:1]) or [0]
        masked[remaining] = torch.where(nothing_left, 0.0, masked[remaining])
        logits[row] = masked
    return logits


def _filters(params: list[SamplingParams], logits: Tensor) -> SamplingRows:
    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    return SamplingRows(
        temperature=column([p.temperature for p in params]),
        top_k=column([p.top_k for p in params], torch.int64),
        top_p=column([p.top_p for p in params]),
        min_p=column([p.min_p for p in params]),
    )
