"""A whole small model through the Triton kernels (interpreted, without a GPU) gives the torch backend's tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.accuracy import poisoned
from torch import Tensor

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.kernels.triton_language import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed here")
NEW_TOKENS = 5


@contextmanager
def recorded_scores(model: afnext.Model) -> Iterator[list[Tensor]]:
    """The scores that each token was chosen from, in order."""
    decoder, scores = model.network.decoder, []
    plain = decoder.logits

    def record(hidden: Tensor) -> Tensor:
        scores.append(plain(hidden).float().cpu())
        return scores[-1].to(hidden.device)

    decoder.logits = record  # type: ignore[method-assign]
    try:
        yield scores
    finally:
        del decoder.logits


def answer(model: afnext.Model, backend: str, samples: np.ndarray) -> tuple[list[int], list[Tensor]]:
    with recorded_scores(model) as scores, poisoned(backend):
        result = model.ask((samples, 16_000), "What is it?", max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return list(result.token_ids), scores


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("seconds", [2.3, pytest.param(61.0, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_tokens_equal_those_of_torch(seconds: float, kv: str, where: str, tmp_path: Path, seed: int) -> None:
    """Where two tokens are as likely as bfloat16 can tell, either is right and what follows is not compared.

    Without drafts, so that every token has scores of its own.
    """
    folder = write_random_checkpoint(tmp_path, seed=seed)
    model = afnext.load(folder, device=where, dtype="bfloat16", kv=kv, draft_tokens=0)
    samples = np.random.default_rng(seed).standard_normal(round(16_000 * seconds)).astype(np.float32) * 0.1
    expected, scores = answer(model, "torch", samples)
    actual, own = answer(model, "triton", samples)
    for step, (theirs, ours) in enumerate(zip(expected, actual, strict=True)):
        error = (scores[step] - own[step]).norm() / scores[step].norm()
        assert error < 0.05, f"step {step}: the scores differ by {error:.3f}"
        if theirs != ours:
            best = scores[step].flatten()
            assert best[theirs] - best[ours] < 0.02 * best.abs().max(), f"step {step}: {ours} instead of {theirs}"
            return
