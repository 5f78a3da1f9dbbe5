"""From logits to tokens: transformers' logits processors decide what is kept, a uniform number what is drawn."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import backends, native_backends, poisoned
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from afnext.kernels import sampling as module
from afnext.kernels.sampling import SamplingRows, greedy, penalize, sample

GREEDY = ["reference", *backends(module._greedy)]
SAMPLERS = ["reference", *backends(module._sample)]
PENALIZERS = ["reference", *backends(module._penalize)]
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1
VOCABULARY = 151_672


def rows(
    batch: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    device: torch.device | None = None,
) -> SamplingRows:
    """The same parameters for each row of a batch."""
    return SamplingRows(
        torch.full((batch,), temperature, device=device),
        torch.full((batch,), top_k, dtype=torch.int64, device=device),
        torch.full((batch,), top_p, device=device),
        torch.full((batch,), min_p, device=device),
    )


def interpreted(backend: str, device: torch.device) -> bool:
    """Whether kernels run in the interpreter: a row takes a tenth of a second there."""
    return backend == "triton" and device.type == "cpu"


def some(count: int, backend: str, device: torch.device, at_most: int = 4) -> Tensor:
    """Of `count` rows those to try: all, but in the interpreter `at_most`, the last two included."""
    if not interpreted(backend, device) or count <= at_most:
        return torch.arange(count)
    return torch.cat((torch.randperm(count - 2)[: at_most - 2].sort().values, torch.arange(count - 2, count)))


def kept_by_transformers(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """[vocab] float64 probabilities after transformers' filters in the order of its `generate`; 0 where filtered."""
    processors: Any = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    processors.append(TopPLogitsWarper(top_p))
    processors.append(MinPLogitsWarper(min_p))
    filtered: Tensor = processors(torch.zeros(1, 1, dtype=torch.int64), logits.double()[None])
    return filtered[0].softmax(0)


@pytest.mark.parametrize("penalty", [1.0, 1.2, 0.7, 5.0])
@pytest.mark.parametrize("backend", PENALIZERS)
def test_penalty_is_that_of_transformers(backend: str, penalty: float, seed: int, device: torch.device) -> None:
    """Tokens that come twice count once; positive, negative and zero logits; other rows have other penalties."""
    logits = 5 * torch.randn(3, 101)
    logits[:, ::10] = 0
    tokens = torch.randint(0, 101, (3, 60))
    seen = torch.zeros(3, 101, dtype=torch.bool).scatter(1, tokens, True)
    penalties = torch.tensor([penalty, 1.0, 1.5])
    before = logits.clone()
    with poisoned(backend):
        actual = penalize(logits.to(device), seen.to(device), penalties.to(device)).cpu()
    for row in range(3):
        processor = RepetitionPenaltyLogitsProcessor(float(penalties[row]))
        expected = processor(tokens[row : row + 1], before[row : row + 1].clone())
        torch.testing.assert_close(actual[row], expected[0], rtol=1e-6, atol=0)
    assert torch.equal(actual[1], before[1])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("top_k", [0, 1, 5, 37, 1000])
@pytest.mark.parametrize("min_p", [0.0, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("backend", SAMPLERS)
def test_kept_tokens_are_those_of_transformers(
    backend: str, min_p: float, top_k: int, seed: int, device: torch.device
) -> None:
    """Numbers in the middle of each kept token's share, then the largest: each draws its token, the last the last."""
    vocabulary, temperature = 37, 0.5 + float(torch.rand(()))
    logits = 4 * torch.rand(vocabulary)  # no share so small that float32 could not point into it
    masses = (logits.double() / temperature).softmax(0).sort(descending=True).values[: top_k or None]
    masses = masses.cumsum(0) / masses.sum()
    edge = int(torch.randint(0, len(masses), ()))
    between = float((masses[edge] + (masses[edge - 1] if edge else 0)) / 2)  # far from where rounding decides
    every_top_p = (0.0, between, 1.0)
    for top_p in every_top_p if not interpreted(backend, device) else random.sample(every_top_p, 1):
        probabilities = kept_by_transformers(logits, temperature, top_k, top_p, min_p)
        order = probabilities.argsort(descending=True)[: int((probabilities > 0).sum())]
        shares = probabilities[order].cumsum(0)
        middles = shares - probabilities[order] / 2
        uniform = torch.cat((middles.float(), torch.tensor([0.0, BELOW_ONE])))
        expected = torch.cat((order, order[:1], order[-1:]))
        tried = some(len(uniform), backend, device)
        parameters = rows(len(tried), temperature, top_k, top_p, min_p, device)
        with poisoned(backend):
            drawn = sample(logits.expand(len(tried), -1).to(device), parameters, uniform[tried].to(device))
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == expected[tried].tolist()


FILTERS_WITH_TIES = {
    "logits": st.lists(st.integers(-6, 6) | st.just(-torch.inf), min_size=1, max_size=20).filter(
        lambda values: max(values) > -torch.inf
    ),
    "temperature": st.sampled_from([0.05, 0.3, 1.0, 1.7]),
    "top_k": st.integers(0, 25),
    "top_p": st.sampled_from([0.0, 0.37, 0.731, 1.0]),
    "min_p": st.sampled_from([0.0, 0.051, 0.303, 1.0]),
    "uniform": st.floats(0, BELOW_ONE, width=32),
}


def assert_agrees_with_the_reference(
    backend: str, logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> None:
    """The draw is the reference's at a number no more than rounding away, and never a banned token."""
    nearby = torch.tensor([max(uniform - 1e-5, 0), uniform, min(uniform + 1e-5, BELOW_ONE)])
    batch = torch.tensor(logits, dtype=torch.float32).expand(3, -1)
    parameters = rows(3, temperature, top_k, top_p, min_p)
    rank = batch[0].argsort(descending=True, stable=True).argsort()
    with poisoned("reference"):
        ranks = rank[sample(batch, parameters, nearby)]
    with poisoned(backend):
        drawn = int(sample(batch[:1], rows(1, temperature, top_k, top_p, min_p), nearby[1:2]))
    assert ranks[0] <= rank[drawn] <= ranks[2]
    assert logits[drawn] > -torch.inf


@pytest.mark.parametrize("backend", ["torch", *native_backends(module._sample)])
@settings(max_examples=150, database=None)
@given(**FILTERS_WITH_TIES)
def test_torch_and_native_agree_on_ties_and_banned_tokens(backend: str, **case: Any) -> None:
    assert_agrees_with_the_reference(backend, **case)


@pytest.mark.skipif("triton" not in SAMPLERS, reason="Triton is not installed")
@settings(max_examples=20, database=None)
@given(**FILTERS_WITH_TIES)
def test_triton_agrees_on_ties_and_banned_tokens(**case: Any) -> None:
    assert_agrees_with_the_reference("triton", **case)


@pytest.mark.parametrize("backend", SAMPLERS)
def test_draws_have_the_right_frequencies(backend: str, seed: int, device: torch.device) -> None:
    count, temperature, top_k = len(some(4000, backend, device, at_most=40)), 0.8, 9
    logits = torch.randn(12)
    expected = kept_by_transformers(logits, temperature, top_k, 1.0, 0.0)
    with poisoned(backend):
        drawn = sample(
            logits.expand(count, -1).to(device),
            rows(count, temperature, top_k, device=device),
            torch.rand(count).to(device),
        )
    counts = drawn.bincount(minlength=12).cpu()
    kept = expected > 0
    assert int(counts[~kept].sum()) == 0
    chi_square = ((counts - expected * count)[kept] ** 2 / (expected[kept] * count)).sum()
    degrees = torch.tensor(top_k - 1, dtype=torch.float64)
    assert float(torch.special.gammaincc(degrees / 2, chi_square / 2)) > 1e-7, "the p-value of a chi-square test"


@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("backend", backends(module._sample))
def test_full_vocabulary(backend: str, spread: float, seed: int, device: torch.device) -> None:
    """Each draw is the token into whose share of the whole its number falls, up to float32; flat rows included."""
    logits = spread * torch.randn(4999 if interpreted(backend, device) else VOCABULARY)
    uniform = torch.cat((torch.rand(14), torch.tensor([0.0, BELOW_ONE])))[some(16, backend, device)]
    n = len(uniform)
    with poisoned(backend):
        drawn = sample(logits.expand(n, -1).to(device), rows(n, device=device), uniform.to(device)).cpu()
    order = logits.argsort(descending=True, stable=True)
    upper = logits.double()[order].softmax(0).cumsum(0)
    rank = order.argsort()[drawn]
    lower = torch.where(rank > 0, upper[rank - 1], 0)
    assert (lower - 1e-6 <= uniform).all()
    assert (uniform <= upper[rank] + 1e-6).all()


@pytest.mark.parametrize("vocabulary", [2049, 6007])
@pytest.mark.parametrize("backend", backends(module._sample))
def test_filters_over_a_larger_vocabulary(backend: str, vocabulary: int, seed: int, device: torch.device) -> None:
    """Small top_k against the reference, with ties across the edge: tokens far apart, many of them equal."""
    batch = 2
    logits = (2 * torch.randn(batch, vocabulary)).round(decimals=1)
    parameters = SamplingRows(
        torch.tensor([0.7, 1.3]), torch.tensor([7, 40]), torch.tensor([1.0, 0.8]), torch.tensor([0.0, 0.02])
    )
    uniform = torch.rand(batch)
    with poisoned("reference"):
        expected = sample(logits, parameters, uniform)
    with poisoned(backend):
        on_device = SamplingRows(*(x.to(device) for x in vars(parameters).values()))
        drawn = sample(logits.to(device), on_device, uniform.to(device))
    assert drawn.tolist() == expected.tolist()


@pytest.mark.parametrize("backend", GREEDY)
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 2048), (2, 6007)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_the_largest(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    logits = torch.randint(-50, 50, shape).to(dtype)
    logits[0] = -torch.inf
    logits[0, -1] = -60
    with poisoned(backend):
        chosen = greedy(logits.to(device))
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("backend", SAMPLERS)
def test_larger_numbers_draw_less_likely_tokens(backend: str, seed: int, device: torch.device) -> None:
    logits = torch.randperm(50) / 10  # the most likely has a share of 0.1
    n = 13 if interpreted(backend, device) else 201
    uniform = torch.linspace(0, BELOW_ONE, n)
    with poisoned(backend):
        drawn = sample(logits.expand(n, -1).to(device), rows(n, device=device), uniform.to(device)).cpu()
    assert (logits[drawn].diff() <= 0).all()
    assert int(drawn[0]) == int(logits.argmax())
    assert len(drawn.unique()) > 4


@pytest.mark.parametrize("backend", SAMPLERS)
def test_filters_down_to_one_token_are_greedy(backend: str, seed: int, device: torch.device) -> None:
    """Also with filters that would leave no token at all: the most likely one stays."""
    n = 3
    logits = torch.randn(n, 83).to(device)
    uniform = torch.rand(n).to(device)
    expected = greedy(logits)
    assert expected.tolist() == [max(range(83), key=row.__getitem__) for row in logits.tolist()]
    for only in (
        rows(n, top_k=1, device=device),
        rows(n, top_p=0.0, device=device),
        rows(n, min_p=1.0, device=device),
        rows(n, min_p=2.0, device=device),
        rows(n, temperature=1e-4, device=device),
        rows(n, temperature=1e-39, device=device),
        rows(n, 0.5, 1, 0.0, 1.0, device),
    ):
        with poisoned(backend):
            assert torch.equal(sample(logits, only, uniform), expected)


@pytest.mark.parametrize("backend", SAMPLERS)
def test_ties(backend: str, device: torch.device) -> None:
    """Greedy and top_k = 1 take the lowest token id; shares of equal tokens follow their ids."""
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0, 3.0, 1.0]], device=device)
    assert greedy(logits).tolist() == [1]
    uniform = torch.tensor([0.0, 0.3, 0.6, 0.9], device=device)
    with poisoned(backend):
        assert sample(logits.expand(4, -1), rows(4, top_k=1, device=device), uniform).tolist() == [1, 1, 1, 1]
        assert sample(logits.expand(4, -1), rows(4, min_p=1.0, device=device), uniform).tolist() == [1, 2, 3, 4]
        assert sample(logits.expand(4, -1), rows(4, top_k=2, device=device), uniform).tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("backend", SAMPLERS)
def test_a_draw_is_independent_of_the_batch(backend: str, seed: int, device: torch.device) -> None:
    """Each row has its own parameters and number; alone, together and in another order it draws the same."""
    batch, vocabulary = 8, 211
    logits, uniform = 3 * torch.randn(batch, vocabulary), torch.rand(batch)
    parameters = (
        0.5 + torch.rand(batch),
        torch.tensor([0, 1, 2, 10, 100, 0, 500, 3]),
        torch.tensor([1.0, 0.9, 0.5, 0.0, 0.99, 0.7, 0.8, 1.0]),
        torch.tensor([0.0, 0.1, 0.0, 0.0, 0.5, 0.01, 0.0, 1.0]),
    )

    def draw(chosen: Tensor) -> list[int]:
        with poisoned(backend):
            return sample(
                logits[chosen].to(device),
                SamplingRows(*(p[chosen].to(device) for p in parameters)),
                uniform[chosen].to(device),
            ).tolist()

    together = draw(torch.arange(batch))
    shuffled = torch.randperm(batch)
    assert draw(shuffled) == [together[row] for row in shuffled]
    assert [draw(torch.tensor([row]))[0] for row in range(batch)] == together


def test_wrong_shapes_and_dtypes() -> None:
    logits, seen, one = torch.zeros(2, 7), torch.zeros(2, 7, dtype=torch.bool), torch.ones(2)
    for wrong in (logits.half(), torch.zeros(7), torch.zeros(1, 2, 7)):
        with pytest.raises(ValueError, match="float32 logits") as error:
            sample(wrong, rows(2), one / 2)
        assert str(tuple(wrong.shape)) in str(error.value)
        with pytest.raises(ValueError, match=str(wrong.dtype)):
            penalize(wrong, seen, one)
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(3,\)"):
        sample(logits, rows(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(3,\)"):
        sample(logits, rows(3), one / 2)
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(1,\)"):
        penalize(logits, seen, torch.ones(1))
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(2, 6\)"):
        penalize(logits, seen[:, :6], one)
    with pytest.raises(ValueError, match=r"\(7,\)"):
        greedy(logits[0])
