"""Attention that tells of some of its weights: values and gradients equal those of the plain formula."""

import torch
from torch import Tensor

from training.watched_attention import watched_attention


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    logarithms = (q @ k.transpose(-1, -2) + bias).log_softmax(-1)
    return logarithms.exp() @ v, logarithms[tuple(places)]


def test_values_and_gradients_equal_the_formulas(seed: int) -> None:
    shape = (2, 3, 17, 8)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    bias = torch.full((17, 17), -torch.inf).triu(1) + torch.randn(17, 17)
    queries = torch.randint(1, 17, (40,))
    keys = (torch.rand(40) * (queries + 1)).long()  # what a query may see; some places come twice
    places = torch.stack((torch.randint(2, (40,)), torch.randint(3, (40,)), queries, keys))
    weights, shares = torch.randn(shape), torch.randn(40)
    results = []
    for attend in (plain, watched_attention):
        out, told = attend(*inputs, bias[None, None], places)
        gradients = torch.autograd.grad((out * weights).sum() + (told * shares).sum(), inputs)
        results.append((out.detach(), told.detach(), *gradients))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_without_places_it_is_attention(seed: int) -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    out, told = watched_attention(q, k, v, torch.zeros(1, 1, 9, 9), torch.zeros(4, 0, dtype=torch.long))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out, expected)
    assert not len(told)
