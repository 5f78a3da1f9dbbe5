"""Divergence on right lists: the probabilities are those of generation, and four bits diverge more than eight."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import afnext
from training.forced import divergences, forced, log_probabilities
from training.voices import RATE

TINY = Path(afnext.runtime.model.__file__).parent / "afnext_tiny"
ANSWERS = {
    "What do you hear?": '[00:00.5] beep\n[00:01.0] "seven"',
    "List the sounds with timestamps.": "[00:00.5] beep",
}


@pytest.fixture
def samples(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(RATE * 3).astype(np.float32) * 0.1


def test_probabilities_are_those_of_generation(samples: np.ndarray) -> None:
    """Every token of the model's own greedy answer is the most probable one, up to rounding."""
    with afnext.load(TINY, dtype="float32") as model:
        said = model.ask((samples, RATE), "What do you hear?", temperature=0.0, max_new_tokens=60).token_ids
        asked = [replace(each, answer=list(said)) for each in forced(TINY, samples, ANSWERS)]
        scores = log_probabilities(model.network, asked, "auto")[0]
    assert len(scores) == len(said) > 0
    chosen = scores.gather(1, torch.tensor(said)[:, None])[:, 0]
    assert float((scores.amax(-1) - chosen).max()) < 1e-3
    assert torch.allclose(scores.exp().sum(-1), torch.ones(len(scores), dtype=torch.float64))


def test_int4_diverges_more_than_int8(samples: np.ndarray) -> None:
    with afnext.load(TINY, dtype="float32") as model:
        asked = list(forced(TINY, samples, ANSWERS))
        exact, int8, int4 = (log_probabilities(model.network, asked, kv) for kv in ("auto", "int8", "int4"))
    tokens = sum(len(each.answer) for each in asked)
    assert divergences(exact, exact, asked)[:, :2].abs().max() == 0
    eight, four = divergences(exact, int8, asked), divergences(exact, int4, asked)
    assert eight.shape == four.shape == (tokens, 3)
    assert 0 < eight[:, 0].mean() < four[:, 0].mean()


def test_divergence_is_that_of_the_definition(samples: np.ndarray) -> None:
    asked = [replace(each, answer=[1]) for each in forced(TINY, samples, {"What do you hear?": "beep"})]
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.25, 0.5, 0.25]]).double()
    [[divergence, changed, right]] = divergences([p.log()], [q.log()], asked).tolist()
    assert divergence == pytest.approx(0.25 * np.log(2))
    assert changed == 1
    assert right == pytest.approx(np.log(2))
