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
    stop_token_ids: any of these ends the answer, as its last token. Raises SamplingError for values out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

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
    """Chooses tokens for a batch of sequences and remembers what each has seen.

    A sampled sequence draws from its own generator, so its tokens depend on its seed alone and not on its neighbours.
    """

    def __init__(self, params: list[SamplingParams], prompts: list[list[int]], vocab_size: int, device: torch.device):
        self._params = params
        self._device = device
        self._generators = [torch.Generator() for _ in params]
        for generator, p in zip(self._generators, params, strict=True):
            generator.manual_seed(p.seed % 2**63) if p.seed is not None else generator.seed()
        self._seen: Tensor | None = None
        if any(p.repetition_penalty != 1.0 for p in params):
            self._seen = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in zip(self._seen, prompts, strict=True):
                row[torch.tensor(prompt, device=device)] = True

    def choose(self, logits: Tensor, rows: list[int]) -> list[int]:
        """The next token of each of the sequences `rows`. logits: [len(rows), vocab] float32."""
        params = [self._params[row] for row in rows]
        if self._seen is not None:
            penalty = torch.tensor([p.repetition_penalty for p in params], device=self._device)
            logits = penalize(logits, self._seen[rows], penalty)
        tokens = greedy(logits)
        sampled = [i for i, p in enumerate(params) if p.temperature > 0]
        if sampled:
            tokens[sampled] = self._draw(logits[sampled], [rows[i] for i in sampled])
        if self._seen is not None:
            self._seen[rows, tokens] = True
        return tokens.tolist()

    def _draw(self, logits: Tensor, rows: list[int]) -> Tensor:
        params = [self._params[row] for row in rows]
        uniform = torch.cat([torch.rand(1, generator=self._generators[row]) for row in rows])
        filters = SamplingRows(
            temperature=torch.tensor([p.temperature for p in params], device=self._device),
            top_k=torch.tensor([p.top_k for p in params], device=self._device),
            top_p=torch.tensor([p.top_p for p in params], device=self._device),
            min_p=torch.tensor([p.min_p for p in params], device=self._device),
        )
        return sample(logits, filters, uniform.to(self._device))
