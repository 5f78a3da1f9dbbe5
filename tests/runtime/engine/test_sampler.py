"""Per-request sampling: parameters, seeds, independence of the batch."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from afnext.runtime.engine.sampler import Sampler, SamplingParams, choose
from afnext.runtime.errors import SamplingError

VOCAB = 50


def sampler(params: SamplingParams, prompt: tuple[int, ...] = (1, 2)) -> Sampler:
    return Sampler(params, list(prompt), VOCAB, torch.device("cpu"))


def draws(params: list[SamplingParams], row: int, logits: torch.Tensor) -> list[int]:
    """The tokens of one row over many steps, the whole batch sampled each time."""
    samplers = [sampler(p) for p in params]
    rows, tokens = len(params), []
    for index, step in enumerate(logits):
        chosen = choose(step.expand(rows, -1), samplers, [index] * rows)
        for one, token in zip(samplers, chosen, strict=True):
            one.accept(token)
        tokens.append(chosen[row])
    return tokens


def test_a_seed_repeats_whatever_the_neighbours_do(seed: int) -> None:
    logits = torch.randn(30, VOCAB)
    mine = SamplingParams(30, temperature=1.0, seed=seed)
    greedy, other = SamplingParams(30), SamplingParams(30, temperature=2.0, seed=seed + 1, top_k=3)
    alone = draws([mine], 0, logits)
    assert draws([greedy, mine, other], 1, logits) == alone
    assert draws([other, other, mine], 2, logits) == alone
    assert draws([SamplingParams(30, temperature=1.0, seed=seed + 1)], 0, logits) != alone


def test_without_a_seed_answers_differ(seed: int) -> None:
    logits = torch.randn(40, VOCAB)
    fresh = SamplingParams(40, temperature=1.0)
    assert draws([fresh], 0, logits) != draws([fresh], 0, logits)


def test_the_penalty_counts_prompt_and_answer(seed: int) -> None:
    penalized = sampler(SamplingParams(VOCAB, repetition_penalty=1e6), (7, 3))
    logits = torch.rand(1, VOCAB) + 1
    tokens = []
    for index in range(VOCAB - 2):
        tokens += choose(logits, [penalized], [index])
        penalized.accept(tokens[-1])
    assert sorted(tokens) == [token for token in range(VOCAB) if token not in (3, 7)]


def test_a_token_is_drawn_the_same_however_often_and_in_whatever_order(seed: int) -> None:
    """What is computed again, or ahead, does not move the draws of the others."""
    params = SamplingParams(30, temperature=1.0, seed=seed)
    logits = torch.randn(30, VOCAB)
    expected = draws([params], 0, logits)
    again = sampler(params)
    for index in (5, 0, 29, 5, 12):
        assert choose(logits[index : index + 1], [again], [index]) == [expected[index]]


def test_rows_keep_their_own_parameters(seed: int) -> None:
    logits = torch.randn(3, VOCAB)
    first, last = (
        sampler(SamplingParams(9)),
        sampler(SamplingParams(9, repetition_penalty=1e6), (int(logits[2].argmax()),)),
    )
    middle = sampler(SamplingParams(9, temperature=0.5, seed=1))
    tokens = choose(logits, [first, middle, last], [0, 0, 0])
    assert tokens[0] == int(logits[0].argmax())
    assert tokens[2] == int(logits[2].topk(2).indices[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "5"),
        ("max_new_tokens", None),
        ("max_new_tokens", True),
        ("max_new_tokens", 2**31),
        ("temperature", -0.1),
        ("temperature", 1e-46),
        ("temperature", 1e39),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 50.0),
        ("top_p", 0.0),
        ("top_p", 1e-46),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", 1e-50),
        ("repetition_penalty", float("nan")),
        ("seed", 1.0),
        ("stop_repetition", 1),
        ("min_new_tokens", -1),
        ("no_repeat_ngram_size", 1.0),
    ],
)
def test_values_of_another_type_or_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(SamplingError, match=re.escape(f"{name} is {value!r}; it must be")):
        SamplingParams(**{"max_new_tokens": 4, name: value})  # type: ignore[arg-type]


def test_huge_integers_are_refused_with_a_short_sentence() -> None:
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"):
        with pytest.raises(SamplingError, match=f"{name} is a huge integer"):
            SamplingParams(**{"max_new_tokens": 4, name: 10**400})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suppress_tokens", "12"),
        ("suppress_tokens", 3),
        ("suppress_tokens", np.array(3)),
        ("suppress_tokens", [1.0]),
        ("begin_suppress_tokens", [-1]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [5]),
        ("bad_words_ids", [[1]] * 10_001),
        ("bad_words_ids", [[1] * 257]),
        ("sequence_bias", [[[1]]]),
        ("sequence_bias", [[[1], float("nan")]]),
        ("sequence_bias", [[[1], 1e31]]),
    ],
)
def test_token_lists_are_checked(name: str, value: object) -> None:
    with pytest.raises(SamplingError, match=name):
        SamplingParams(4, **{name: value})  # type: ignore[arg-type]


ALIKE: list[dict[str, list[object]]] = [
    {"temperature": [1.0, 1, np.int64(1), np.float32(1), np.float64(1), Fraction(1)]},
    {"top_k": [3, np.int32(3), np.uint8(3)], "temperature": [1.0]},
    {"top_p": [1.0, 1, np.int8(1), np.float16(1)], "temperature": [1.0]},
    {"min_p": [1.0, 1, np.int64(1)], "temperature": [1.0]},
    {"repetition_penalty": [2.0, 2, np.float32(2)], "temperature": [1.0]},
    {"temperature": [float(2**31), 2**31]},
    {"seed": [7, np.int64(7), np.uint8(7)], "temperature": [1.0]},
]


@pytest.mark.parametrize("alike", ALIKE, ids=lambda alike: next(iter(alike)))
def test_a_number_means_the_same_whatever_its_type(alike: dict[str, list[object]], seed: int) -> None:
    """Integers, floats and numpy's scalars: what was drawn with one is drawn with the others."""
    name, values = next(iter(alike.items()))
    others = {other: value[0] for other, value in alike.items() if other != name}
    logits = torch.randn(20, VOCAB)
    drawn = [
        draws([SamplingParams(**{"max_new_tokens": 20, "seed": 7, **others, name: value})], 0, logits)
        for value in values
    ]
    assert all(one == drawn[0] for one in drawn)


def test_a_high_temperature_draws_from_all_tokens(seed: int) -> None:
    hot = SamplingParams(200, temperature=2**31, seed=seed)
    assert len(set(draws([hot], 0, torch.randn(200, VOCAB)))) > VOCAB / 2
