"""The simple path to an answer, which every other one must equal.

One request alone, its windows encoded one by one, its prompt in one piece, one page for everything, one token at a
time, drawn by the specification of sampling.
"""

from dataclasses import dataclass

import torch
from support.audio import speech_like
from support.constraints import processed

from afnext.kernels.sampling import SamplingRows, penalize_reference, sample_reference
from afnext.runtime.engine.kv_cache import KVCache, page_table
from afnext.runtime.engine.prefill import AudioInput
from afnext.runtime.engine.request import Request
from afnext.runtime.engine.sampler import SamplingParams
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.encoder import token_count

NOISE = 1e-4


def request(
    model: AudioFlamingo, new_tokens: int, seconds: float = 0.0, content: int = 0, **sampling: object
) -> Request:
    """Some text, and a recording where `seconds` is above 0."""
    text = torch.randint(0, 256, (9,), generator=torch.Generator().manual_seed(content)).tolist()
    params = SamplingParams(new_tokens, **sampling)  # type: ignore[arg-type]
    if not seconds:
        return Request(text, (), params)
    windows = torch.from_numpy(speech_like(seconds, content)).split(480_000)
    tokens = sum(token_count(len(window)) for window in windows)
    return Request([*text[:4], *[model.config.audio_token_id] * tokens, *text[4:]], (AudioInput(4, windows),), params)


@dataclass(frozen=True)
class SimpleAnswer:
    """Tokens, and by how much each was ahead: the lead of a greedy token's score, and of a drawn one whether a draw
    nearby gives it too."""

    tokens: list[int]
    leads: list[float]

    def assert_equals(self, tokens: list[int], *, whole: bool = True) -> None:
        """Fail unless `tokens` are these (the first of these, if not `whole`), or part from them where a token was
        ahead by no more than rounding."""
        for ours, theirs, lead in zip(tokens, self.tokens, self.leads, strict=False):
            if ours != theirs:
                assert lead <= NOISE, f"{tokens} instead of {self.tokens}"
                return
        assert len(tokens) == len(self.tokens) if whole else len(tokens) <= len(self.tokens)


@torch.inference_mode()
def simple_answer(model: AudioFlamingo, request: Request) -> SimpleAnswer:
    """The answer to `request`, taken the simple path."""
    sampling = request.sampling
    assert sampling is not None
    ids = list(request.token_ids)
    cache = KVCache(
        model.config.decoder,
        pages=1,
        page_size=len(ids) + sampling.max_new_tokens,
        device=model.device,
        dtype=model.dtype,
    )
    x = _prompt(model, request)
    generator = torch.Generator().manual_seed(sampling.seed or 0)
    tokens: list[int] = []
    leads: list[float] = []
    start = 0
    while True:
        positions = torch.arange(start, len(ids), device=model.device)[None]
        view = cache.view(page_table([[0]], model.device), positions)
        logits = model.decoder.logits(model.decoder(x, positions, view)[:, -1])
        raw = logits
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        logits = penalize_reference(logits, seen, torch.tensor([sampling.repetition_penalty]))
        if sampling.constrained:
            logits = processed(sampling, request.token_ids, tokens, raw[0])[None]
        token, lead = _greedy(logits) if sampling.temperature == 0 else _drawn(logits, sampling, generator)
        tokens.append(token)
        leads.append(lead)
        if token in sampling.stop_token_ids or len(tokens) == sampling.max_new_tokens:
            return SimpleAnswer(tokens, leads)
        start = len(ids)
        ids.append(token)
        x = model.decoder.embed(torch.tensor([[token]]))


def _prompt(model: AudioFlamingo, request: Request) -> torch.Tensor:
    x = model.decoder.embed(torch.tensor([request.token_ids]))
    for recording in request.audio:
        at = recording.position
        for index, window in enumerate(recording.windows):
            if token_count(len(window)):
                (rows,) = model.encode(model.log_mel([window]), [len(window)], [index])
                x[0, at : at + len(rows)] = rows
                at += len(rows)
    return x


def _greedy(logits: torch.Tensor) -> tuple[int, float]:
    best, second = logits[0].topk(2)
    return int(second[0]), float(best[0] - best[1])


def _drawn(logits: torch.Tensor, sampling: SamplingParams, generator: torch.Generator) -> tuple[int, float]:
    rows = SamplingRows(
        torch.tensor([sampling.temperature]),
        torch.tensor([sampling.top_k]),
        torch.tensor([sampling.top_p]),
        torch.tensor([sampling.min_p]),
    )
    uniform = torch.rand(1, generator=generator)
    token = int(sample_reference(logits, rows, uniform))
    nearby = [uniform + step * NOISE for step in (-1, 1)]
    certain = all(int(sample_reference(logits, rows, u.clamp(0, 1 - 2**-24))) == token for u in nearby)
    return token, 1.0 if certain else 0.0
