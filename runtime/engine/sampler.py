"""Choice of the next token of each sequence, by its own parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.sampling import SamplingRows, greedy, penalize, sample
from ..errors import SamplingError


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen. The default is greedy.

    max_new_tokens: upper bound of the answer's length; temperature: 0 for greedy; top_k: 0 for all tokens; top_p in
    (0, 1]; min_p in [0, 1]; repetition_penalty: > 0, 1 for none; seed: repeats a sampled answer, None for a fresh one;
    stop_token_ids: any of these ends the answer, as its last token; stop_repetition: so does saying the same over and
    over (see `repetition.py`). Raises SamplingError for values out of range.
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

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 (greedy) or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _require(0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "above 0")


def _require(holds: bool, name: str, value: float, allowed: str) -> None:
    if not holds:
        raise SamplingError(f"{name} is {value}; it must be {allowed}")


class Sampler:
    """Chooses the tokens of one sequence and remembers what it has seen.

    The i-th token of a sampled answer is drawn with the i-th number of the sequence's own generator, so tokens depend
    on the seed alone: not on neighbours, and not on how often or in what company a token's scores were computed.
    """

    def __init__(self, params: SamplingParams, prompt: list[int], vocab_size: int, device: torch.device):
        self.params = params
        self.seen: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True
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
        """Note that `token` is now part of the sequence."""
        if self.seen is not None:
            self.seen[token] = True


def choose(
    logits: Tensor, samplers: list[Sampler], indices: list[int], drafted: list[list[int]] | None = None
) -> list[int]:
    """The next token of each of several sequences, or of one after several drafts.

    logits: [len(samplers), vocab] float32; indices: how many tokens each sequence's answer has already; drafted: tokens
    among these that are supposed only, so that the sampler has not seen them.
    """
    if any(sampler.seen is not None for sampler in samplers):
        nothing = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        seen = torch.stack([nothing if sampler.seen is None else sampler.seen for sampler in samplers])
        for row, tokens in enumerate(drafted or ()):
            seen[row, tokens] = True
        penalty = torch.tensor([sampler.params.repetition_penalty for sampler in samplers], device=logits.device)
        logits = penalize(logits, seen, penalty)
    chosen = greedy(logits)
    sampled = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    if sampled:
        uniform = torch.tensor([samplers[row].uniform(indices[row]) for row in sampled], device=logits.device)
        chosen[sampled] = sample(logits[sampled], _filters([samplers[row].params for row in sampled], logits), uniform)
    return chosen.tolist()


def _filters(params: list[SamplingParams], logits: Tensor) -> SamplingRows:
    return SamplingRows(
        temperature=torch.tensor([p.temperature for p in params], device=logits.device),
        top_k=torch.tensor([p.top_k for p in params], device=logits.device),
        top_p=torch.tensor([p.top_p for p in params], device=logits.device),
        min_p=torch.tensor([p.min_p for p in params], device=logits.device),
    )
