"""Attention over an int8 cache with products of integers, against the float64 reference without rounding."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, paged, poisoned
from torch import Tensor

from afnext.bench.ops.guarded import guarded
from afnext.kernels import attention as module
from afnext.kernels.attention import attention
from afnext.kernels.attention_int8 import attention_int8

BACKENDS = backends(module._operation)
NATIVE = [backend for backend in BACKENDS if "native" in str(backend)]


@dataclass(frozen=True)
class Case:
    """Sequences of these lengths, of which the last tokens are queries."""

    lengths: tuple[int, ...]
    queries: int
    heads: tuple[int, int]
    head_dim: int
    page_size: int

    def __str__(self) -> str:
        return f"{self.page_size}-q{self.queries}-k{'+'.join(map(str, self.lengths))}-h{self.heads}-d{self.head_dim}"

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and dense keys and values as int8 codes, whose scale is the last channel: float32, [.., dim + 1].

        Scales of values differ tenfold.
        """
        shape = len(self.lengths), max(self.lengths), self.heads[1], self.head_dim
        q = torch.randn(len(self.lengths), self.queries, self.heads[0], self.head_dim)
        k, v = torch.randn(shape), torch.randn(shape) * 10 ** -torch.rand(*shape[:3], 1)
        return q.to(device, dtype), quantized(k.to(device)), quantized(v.to(device))


CASES = [
    Case((1,), 1, (7, 1), 128, page_size=16),
    Case((5, 16, 17, 33), 5, (7, 1), 64, page_size=16),
    Case((300,), 70, (14, 2), 128, page_size=256),
    Case((255, 256, 257), 3, (8, 2), 32, page_size=256),
    Case((331, 40), 30, (6, 2), 24, page_size=48),
]
LONG = [Case((700, 257), 257, (7, 1), 128, page_size=256), Case((600,), 600, (2, 1), 80, page_size=16)]


def quantized(x: Tensor) -> Tensor:
    """int8 codes with a scale for each token and head, the first of which is zero; the scale is the last channel."""
    x[:, 0] = 0
    scales = x.abs().amax(-1, keepdim=True) / 127
    return torch.cat(((x / scales).nan_to_num(0).round(), scales), -1)


def dense(x: Tensor) -> Tensor:
    return x[..., :-1].double() * x[..., -1:]


def cache(k: Tensor, v: Tensor, lengths: list[int], page_size: int) -> dict[str, Any]:
    """The arguments of the pools. Where there is no token, scales are NaN."""
    k_pool, v_pool, table = paged(k, v, lengths, page_size)
    return {
        "k": k_pool[..., :-1].nan_to_num(77).to(torch.int8),
        "v": v_pool[..., :-1].nan_to_num(77).to(torch.int8),
        "k_scales": k_pool[..., -1].contiguous(),
        "v_scales": v_pool[..., -1].contiguous(),
        "key_lengths": torch.tensor(lengths, device=k.device),
        "page_table": table,
    }


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Queries in 8 bits, weights in 7 bits of the largest among 256 keys, everything else in float32."""
    q_scales = q.float().abs().amax(-1, keepdim=True) / 127
    rounded = (q / q_scales).nan_to_num(0).round() * q_scales
    outputs = []
    for b, length in enumerate(lengths):
        keys, values = (dense(x[b, :length]).float() for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[2] // x.shape[1], dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", rounded[b], keys) * q.shape[-1] ** -0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(length - q.shape[1] + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        steps = torch.cat([part.amax(-1, keepdim=True).expand_as(part) for part in weights.split(256, -1)], -1) / 127
        weights = torch.where(steps > 0, (weights / steps).round() * steps, 0.0)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.stack(outputs).to(q.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(backend: str, case: Case, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    q, k, v = case.tensors(dtype, device)
    lengths = list(case.lengths)
    with poisoned(backend):
        actual = attention_int8(q, **cache(k, v, lengths, case.page_size))
    exact = exactly(attention, q, dense(k), dense(v), causal=True, key_lengths=torch.tensor(lengths, device=device))
    assert_accurate(actual, exact, naive(q, k, v, lengths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_long_sequences(backend: str, case: Case, dtype: torch.dtype, seed: int) -> None:
    test_accuracy(backend, case, dtype, seed, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_of_a_prompt_equal_the_whole(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    """However a prompt is divided, a row rounds alike."""
    case = Case((530,), 530, (4, 2), 64, page_size=16)
    q, k, v = case.tensors(dtype, device)
    with poisoned(backend):
        whole = attention_int8(q, **cache(k, v, [530], 16))
        for first, end in ((0, 9), (250, 262), (300, 513), (513, 530)):
            chunk = attention_int8(q[:, first:end], **cache(k[:, :end], v[:, :end], [end], 16))
            if "native" in backend:
                assert torch.equal(chunk, whole[:, first:end])
            torch.testing.assert_close(chunk, whole[:, first:end])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_without_values_takes_its_weight(backend: str, seed: int, device: torch.device) -> None:
    """The first token of a model often has a large weight and small values, which lessen the result."""
    case = Case((40,), 20, (2, 1), 64, page_size=16)
    q, k, v = case.tensors(torch.float32, device)
    q[:] = 1
    k[:, :, :, :-1] = 0
    k[:, 0] = 1
    k[:, 0, :, -1] = 0.5  # a score of 4, those of the others are 0
    v[:, 1:, :, :-1], v[:, 1:, :, -1] = 127, 1 / 127
    with poisoned(backend):
        actual = attention_int8(q, **cache(k, v, [40], 16))
    others = torch.arange(20.0, 40.0, device=device)
    expected = (others / (others + torch.tensor(4.0).exp()))[None, :, None, None].expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=3e-3, atol=0)


@pytest.mark.parametrize("bias", [0, 20])
@pytest.mark.parametrize("backend", NATIVE)
def test_the_error_is_small_beside_that_of_the_cache(backend: str, bias: int, seed: int) -> None:
    """The errors of docs/kernels.md: 4096 keys, some channels of which have a large part in common. ARM's levels round
    weights to 7 bits, not 8."""
    k, v = torch.randn(2, 1, 4096, 1, 128)
    q = torch.randn(1, 32, 7, 128)
    scale = 2 / (q[0, :, 0] @ k[0, :, 0].T).std().item()
    k[..., torch.randperm(128)[:8]] += bias
    exact = exactly(attention, q, k, v, causal=True, scale=scale)
    held = [quantized(x.clone()) for x in (k, v)]
    arguments = cache(*held, [4096], 256)
    cached = exactly(attention, q, *map(dense, held), causal=True, scale=scale)
    with poisoned(backend):
        actual = attention_int8(q, **arguments, scale=scale)
    own, total, of_cache = (x.square().mean().sqrt().item() for x in (actual - cached, actual - exact, cached - exact))
    assert own <= 0.04 * exact.square().mean().sqrt().item()
    assert total <= (3.0 if backend in ("native-neondot", "native-i8mm") else 2.2) * of_cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", [*CASES[1::2], LONG[1]], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_native_stays_within_its_memory(
    backend: str, case: Case, threads: int, dtype: torch.dtype, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same."""
    q, k, v = case.tensors(dtype, torch.device("cpu"))
    arguments = cache(k, v, list(case.lengths), case.page_size)
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = attention_int8(q, **arguments)
    torch.set_num_threads(threads)
    with poisoned(backend):
        actual = attention_int8(guarded(q), **{name: guarded(x) for name, x in arguments.items()})
    assert torch.equal(actual, expected)


def test_wrong_dtypes() -> None:
    q, pool = torch.zeros(2, 5, 4, 8), torch.zeros(6, 16, 2, 8, dtype=torch.int8)
    scales, table, lengths = torch.zeros(6, 16, 2), torch.zeros(2, 1, dtype=torch.int32), torch.tensor([9, 9])
    options = {"key_lengths": lengths, "page_table": table, "k_scales": scales, "v_scales": scales}
    attention_int8(q, pool, pool, **options)
    with pytest.raises(ValueError, match="int8 or fp8 with scales"):
        attention_int8(q, pool.float(), pool.float(), **options)
    packed = torch.zeros(6, 16, 2, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"in int8, got torch\.uint8"):
        attention_int8(torch.zeros(2, 5, 4, 32), packed, packed, **options)
