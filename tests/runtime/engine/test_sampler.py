"""Per-request sampling: parameters, seeds, independence of the batch."""

import pytest
import torch

from afnext.runtime.engine.sampler import Sampler, SamplingParams
from afnext.runtime.errors import SamplingError

VOCAB = 50


def draws(params: list[SamplingParams], row: int, logits: torch.Tensor) -> list[int]:
    """The tokens of one row over many steps, the whole batch sampled each time."""
    sampler = Sampler(params, [[1, 2]] * len(params), VOCAB, torch.device("cpu"))
    return [sampler.choose(step.expand(len(params), -1), list(range(len(params))))[row] for step in logits]


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
    sampler = Sampler([SamplingParams(9, repetition_penalty=1e6)], [[7, 3]], VOCAB, torch.device("cpu"))
    logits = torch.rand(1, VOCAB) + 1
    tokens = [sampler.choose(logits, [0])[0] for _ in range(VOCAB - 2)]
    assert sorted(tokens) == [token for token in range(VOCAB) if token not in (3, 7)]


def test_rows_are_chosen_by_number(seed: int) -> None:
    logits = torch.randn(3, VOCAB)
    params = [SamplingParams(9), SamplingParams(9, temperature=0.5, seed=1), SamplingParams(9)]
    sampler = Sampler(params, [[0]] * 3, VOCAB, torch.device("cpu"))
    assert sampler.choose(logits[[0, 2]], [0, 2]) == logits[[0, 2]].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(SamplingError, match=f"{name} is {value}"):
        SamplingParams(**{"max_new_tokens": 4, name: value})
