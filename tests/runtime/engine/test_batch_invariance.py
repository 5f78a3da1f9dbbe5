"""With batch_invariant, an answer's tokens and scores are those of the request alone, bit for bit."""

import dataclasses
import random
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from support.simple_path import request
from torch import Tensor

from afnext import kernels
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.quant.recipe import recipe
from afnext.runtime.engine import decode_runner
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.request import Request, SequenceState
from afnext.runtime.engine.sampler import Sampler, choose
from afnext.runtime.model.audio_flamingo import AudioFlamingo

ALONE = EngineOptions(
    page_size=16, chunk_size=64, batch_invariant=True, draft_tokens=0, prefix_cache_bytes=0, encoder_cache_bytes=0
)
SCHEMES = (None, "int8", "int8-w8a8", "int4-g32", "int4-g32-w4a8")
BACKENDS = [None, "torch"]  # None: what the device decides, the native kernels where they are built
Load = Callable[[str | None, torch.dtype], AudioFlamingo]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Random networks by scheme and dtype."""
    loaded: dict[tuple[str | None, torch.dtype], AudioFlamingo] = {}

    def load(scheme: str | None, dtype: torch.dtype) -> AudioFlamingo:
        if (scheme, dtype) not in loaded:
            folder = tmp_path_factory.mktemp("random")
            write_random_checkpoint(folder, quant=None if scheme is None else recipe(scheme))
            loaded[scheme, dtype] = AudioFlamingo.from_folder(
                folder, device=torch.device("cpu"), dtype=lambda stored: dtype
            )
        return loaded[scheme, dtype]

    return load


class Scores:
    """The scores that each token of an answer was chosen from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seen: list[tuple[Sampler, int, list[int], Tensor]] = []
        monkeypatch.setattr(decode_runner, "choose", self._choose)

    def _choose(
        self, logits: Tensor, samplers: list[Sampler], indices: list[int], drafted: list[list[int]] | None = None
    ) -> list[int | None]:
        supposed = drafted or [[] for _ in samplers]
        self._seen += zip(samplers, indices, supposed, logits.clone(), strict=True)
        return choose(logits, samplers, indices, drafted)

    def of(self, sequence: SequenceState) -> Tensor:
        """[tokens, vocab]; what was computed after a wrong guess is left out."""
        rows = {
            index: row
            for sampler, index, guess, row in self._seen
            if sampler is sequence.sampler and sequence.tokens[index - len(guess) : index] == guess
        }
        return torch.stack([rows[index] for index in range(len(sequence.tokens))])


def some_requests(network: AudioFlamingo, seed: int) -> list[Request]:
    """Requests of random lengths, of which two begin alike, with and without sound, greedy and drawn."""
    generator = random.Random(seed)
    requests = []
    for index in range(generator.randint(4, 8)):
        seconds = generator.choice([0.0, 0.0, 0.5, 3.0])
        drawn = {"temperature": 0.9, "seed": index} if index % 3 == 1 else {}
        made = request(network, generator.randint(3, 14), seconds, generator.randrange(4), **drawn)
        length = generator.choice([0, 60, 70, 130, 200])
        more = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        requests.append(dataclasses.replace(made, token_ids=made.token_ids + more, logprobs=index % 2 == 0))
    return requests


def run_alone(network: AudioFlamingo, asked: Request, options: EngineOptions) -> SequenceState:
    engine = Engine(network, options)
    sequence = engine.submit(asked)
    while engine.step():
        pass
    return sequence


def run_together(
    network: AudioFlamingo, requests: list[Request], options: EngineOptions, seed: int
) -> list[SequenceState]:
    """All requests in one engine, arriving at random steps."""
    generator, engine = random.Random(seed), Engine(network, options)
    arrivals = sorted(generator.randint(0, 12) for _ in requests)
    sequences: list[SequenceState] = []
    step, more = 0, True
    while more or len(sequences) < len(requests):
        while len(sequences) < len(requests) and arrivals[len(sequences)] <= step:
            priority = generator.randint(-1, 1)
            sequences.append(engine.submit(dataclasses.replace(requests[len(sequences)], priority=priority)))
        more = engine.step()
        step += 1
    return sequences


def differences(scores: Scores, alone: list[SequenceState], together: list[SequenceState]) -> list[str]:
    """What of each answer is not what it is alone."""
    found = []
    for index, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert one.finish_reason == other.finish_reason == "length", (one.error, other.error)
        if one.tokens != other.tokens:
            found.append(f"tokens of {index}")
        elif not torch.equal(scores.of(one), scores.of(other)):
            found.append(f"scores of {index}")
        elif one.mean_logprob != other.mean_logprob:
            found.append(f"log probability of {index}")
    return found


@pytest.mark.parametrize(
    ("backend", "dtype", "scheme", "kv"),
    [
        *((None, dtype, scheme, "auto") for dtype in (torch.bfloat16, torch.float32) for scheme in SCHEMES),
        (None, torch.float16, None, "auto"),
        (None, torch.bfloat16, None, "fp8"),
        (None, torch.bfloat16, None, "int4"),
        *(("torch", torch.float32, scheme, "auto") for scheme in (None, "int8", "int4-g32")),
        ("torch", torch.bfloat16, "int4-g32-w4a8", "auto"),
        ("torch", torch.float32, None, "int4"),
    ],
)
def test_an_answer_does_not_depend_on_its_company(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    backend: str | None,
    dtype: torch.dtype,
    scheme: str | None,
    kv: str,
    seed: int,
) -> None:
    """Not on neighbours, arrivals, speculative tokens and what caches hold, nor on being preempted."""
    network, scores = load(scheme, dtype), Scores(monkeypatch)
    with kernels.backend(backend) if backend else nullcontext():
        requests = some_requests(network, seed)
        by_itself = dataclasses.replace(ALONE, kv=kv)
        alone = [run_alone(network, asked, by_itself) for asked in requests]
        room = max(asked.budget for asked in requests) + 64
        for draft_tokens in (0, 4):
            options = dataclasses.replace(
                by_itself,
                draft_tokens=draft_tokens,
                prefix_cache_bytes=1 << 20,
                encoder_cache_bytes=1 << 20,
                max_kv_tokens=room,
            )
            together = run_together(network, requests, options, seed)
            assert not differences(scores, alone, together), f"with {draft_tokens} speculative tokens"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_answer_is_taken_up_again_with_the_bits_that_it_had(
    load: Load, monkeypatch: pytest.MonkeyPatch, backend: str | None, seed: int
) -> None:
    """Its prompt was computed by products of many rows and its own tokens by those of few, and so they are again."""
    network, scores = load("int4-g32", torch.float32), Scores(monkeypatch)
    with kernels.backend(backend) if backend else nullcontext():
        asked = dataclasses.replace(request(network, 30, 3.0, seed), logprobs=True)
        alone = run_alone(network, asked, ALONE)
        engine = Engine(network, dataclasses.replace(ALONE, max_kv_tokens=asked.budget + 16, draft_tokens=2))
        first = engine.submit(asked)
        while len(first.tokens) < 20:
            engine.step()
        engine.submit(dataclasses.replace(request(network, 3, 3.0, seed + 1), priority=1))
        while engine.step():
            pass
    assert engine.stats().preemptions == 1
    assert not differences(scores, [alone], [first])


def test_without_the_option_rounding_depends_on_the_company(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the other tests prove nothing. Weights of float32 on torch: other sums for one, two and four rows."""
    network, scores = load(None, torch.float32), Scores(monkeypatch)
    plain = dataclasses.replace(ALONE, batch_invariant=False)
    found = []
    for seed in range(3):
        requests = some_requests(network, seed)
        alone = [run_alone(network, asked, plain) for asked in requests]
        found += differences(scores, alone, run_together(network, requests, plain, seed))
    assert found
