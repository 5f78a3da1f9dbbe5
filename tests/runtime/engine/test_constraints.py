"""What is forbidden or preferred, compared with the logits processors of `transformers`, with drafts and without."""

import dataclasses
import random

import pytest
import torch
from support.constraints import processed
from support.simple_path import request, simple_answer

from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.sampler import Sampler, SamplingParams, choose
from afnext.runtime.errors import SamplingError
from afnext.runtime.model.audio_flamingo import AudioFlamingo

VOCAB = 12
STOP = (3, 9)


def random_params(draw: random.Random) -> SamplingParams:
    """Some constraints of each kind, of few tokens so that they meet."""

    def tokens(most: int, least: int = 0) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB) for _ in range(draw.randint(least, most)))

    sequences = [tokens(3, 1) for _ in range(draw.randint(0, 6))]
    return SamplingParams(
        max_new_tokens=50,
        repetition_penalty=draw.choice([1.0, 1.3]),
        stop_token_ids=STOP,
        min_new_tokens=draw.choice([0, 4]),
        no_repeat_ngram_size=draw.choice([0, 1, 2, 3]),
        suppress_tokens=tokens(2),
        begin_suppress_tokens=tokens(3),
        bad_words_ids=tuple(tokens(3, 1) for _ in range(draw.randint(0, 5))),
        sequence_bias=tuple((sequence, draw.uniform(-3, 3)) for sequence in dict.fromkeys(sequences)),
    )


def usable(params: SamplingParams) -> bool:
    """Whether some token is always allowed, and biases and bad words of one length exist for transformers."""
    single = {word for words in params.bad_words_ids if len(words) == 1 for word in words}
    return len({*params.suppress_tokens, *single}) < VOCAB - 2


def test_scores_equal_those_of_transformers(seed: int) -> None:
    """Token by token, and for all tokens at once as if they were drafted; rows of one batch differ in everything."""
    draw = random.Random(seed)
    for _ in range(60):
        params = [one for one in (random_params(draw) for _ in range(3)) if usable(one)]
        prompts = [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 5))] for _ in params]
        samplers = [
            Sampler(one, prompt, VOCAB, torch.device("cpu")) for one, prompt in zip(params, prompts, strict=True)
        ]
        fresh = [Sampler(one, prompt, VOCAB, torch.device("cpu")) for one, prompt in zip(params, prompts, strict=True)]
        answers: list[list[int]] = [[] for _ in params]
        steps = 8
        logits = torch.randn(steps, len(params), VOCAB)
        left = [True] * len(params)  # until a row has no token left, where transformers has no answer
        for step in range(steps):
            chosen = choose(logits[step], samplers, [step] * len(params))
            for row, token in enumerate(chosen):
                scores = processed(params[row], prompts[row], answers[row], logits[step, row])
                left[row] = left[row] and bool(scores.isfinite().any())
                if left[row]:
                    assert token == int(scores.argmax()), (params[row], prompts[row], answers[row])
                answers[row].append(token)
                samplers[row].accept(token)
        for row, sampler in enumerate(fresh):
            drafts = [answers[row][:step] for step in range(steps)]
            chosen = choose(logits[:, row], [sampler] * steps, list(range(steps)), drafts)
            assert chosen == answers[row], "drafts change what is chosen"


def test_sampled_tokens_are_never_forbidden_ones(seed: int) -> None:
    allowed = {1, 5}
    params = SamplingParams(
        30, temperature=5.0, seed=seed, suppress_tokens=tuple(token for token in range(VOCAB) if token not in allowed)
    )
    sampler = Sampler(params, [0], VOCAB, torch.device("cpu"))
    drawn = {choose(torch.randn(1, VOCAB), [sampler], [index])[0] for index in range(60)}
    assert drawn == allowed


def test_where_no_token_is_left_the_answer_ends() -> None:
    params = SamplingParams(30, no_repeat_ngram_size=1, stop_token_ids=STOP)
    sampler = Sampler(params, list(range(VOCAB)), VOCAB, torch.device("cpu"))
    assert choose(torch.randn(1, VOCAB), [sampler], [0]) == [STOP[0]]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (SamplingParams(4, suppress_tokens=tuple(range(VOCAB))), "leave no token"),
        (SamplingParams(4, bad_words_ids=tuple((token,) for token in range(VOCAB))), "leave no token"),
        (SamplingParams(4, sequence_bias=(((1, VOCAB), 1.0),)), f"sequence_bias has the token {VOCAB}"),
    ],
)
def test_what_does_not_fit_the_vocabulary_is_refused(params: SamplingParams, said: str) -> None:
    with pytest.raises(SamplingError, match=said):
        Sampler(params, [1], VOCAB, torch.device("cpu"))


CONSTRAINED: dict[str, object] = {
    "stop_token_ids": (1, 2),
    "min_new_tokens": 40,
    "no_repeat_ngram_size": 3,
    "suppress_tokens": tuple(range(10, 40)),
    "begin_suppress_tokens": tuple(range(40, 140)),
    "bad_words_ids": tuple((token, token + 1) for token in range(140, 200)),
    "sequence_bias": tuple(((token,), 0.02) for token in range(0, 256, 5)),
    "repetition_penalty": 1.05,
}


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "top_k": 20}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafts", [0, 7])
def test_answers_of_the_engine_are_those_of_transformers_processors(
    network: AudioFlamingo, drafts: int, sampled: dict[str, object], seed: int
) -> None:
    """In a batch, with drafts and without, and with the later requests interrupted by the most urgent one."""
    asked = [
        request(network, 50, 0, seed + i, **CONSTRAINED, **({"seed": seed + i, **sampled} if sampled else {}))
        for i in range(3)
    ]
    expected = [simple_answer(network, one) for one in asked]
    free = request(network, 50, 0, seed)
    assert simple_answer(network, free).tokens != expected[0].tokens
    engine = Engine(network, EngineOptions(page_size=16, draft_tokens=drafts, max_kv_tokens=144))
    sequences = [engine.submit(one) for one in asked[:2]]
    for _ in engine.follow(sequences[:1]):
        if len(sequences) == 2 and len(sequences[0].tokens) > 9:
            urgent = dataclasses.replace(asked[2], priority=2)
            sequences.append(engine.submit(urgent))
    for _ in engine.follow(sequences):
        pass
    for answer, sequence in zip(expected, sequences, strict=True):
        answer.assert_equals(sequence.tokens)
