"""Decode attention: what causal attention gives for the newest tokens, on every backend."""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, paged, poisoned
from torch import Tensor

from afnext.kernels import decode_attention as module
from afnext.kernels.attention import attention
from afnext.kernels.decode_attention import MAX_NEW_TOKENS, decode_attention

BACKENDS = backends(module._operation)
# key lengths, (heads, kv_heads), head_dim, page_size
SHAPES = [
    ((8,), (1, 1), 16, 16),
    ((15, 16, 17, 33), (7, 1), 64, 16),
    ((257, 8, 256), (4, 2), 32, 256),
    ((331,), (28, 4), 128, 256),
    ((97, 41), (8, 2), 24, 16),
]
Shape = tuple[tuple[int, ...], tuple[int, int], int, int]


def tensors(shape: Shape, new_tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, and dense k, v as long as the longest sequence."""
    lengths, (heads, kv_heads), head_dim, _ = shape
    q = torch.randn(len(lengths), new_tokens, heads, head_dim)
    k, v = torch.randn(2, len(lengths), max(lengths), kv_heads, head_dim)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Scores, softmax and sum as written, in the dtype of q, one sequence at a time."""
    outputs = []
    for b, length in enumerate(lengths):
        keys, values = k[b, :length], v[b, :length]
        grouped = q[b].unflatten(1, (k.shape[2], -1))
        scores = torch.einsum("nhgd,khd->hgnk", grouped, keys) * q.shape[-1] ** -0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(length - q.shape[1] + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hgnk,khd->nhgd", weights, values).flatten(1, 2))
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new_tokens", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(
    backend: str, shape: Shape, new_tokens: int, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    lengths, _, _, page_size = shape
    q, k, v = tensors(shape, new_tokens, dtype, device)
    k_pool, v_pool, table = paged(k, v, list(lengths), page_size)
    key_lengths = torch.tensor(lengths, device=device)
    with poisoned(backend):
        actual = decode_attention(q, k_pool, v_pool, key_lengths=key_lengths, page_table=table)
    exact = exactly(attention, q, k, v, causal=True, key_lengths=key_lengths)
    assert_accurate(actual, exact, plain(q, k, v, lengths))


@pytest.mark.parametrize("new_tokens", range(1, MAX_NEW_TOKENS + 1))
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_causal_attention(backend: str, new_tokens: int, seed: int, device: torch.device) -> None:
    """Over the same pages; one sequence holds nothing but its new tokens."""
    shape: Shape = ((50, new_tokens, 16), (14, 2), 32, 16)
    q, k, v = tensors(shape, new_tokens, torch.float32, device)
    k_pool, v_pool, table = paged(k, v, list(shape[0]), 16)
    key_lengths = torch.tensor(shape[0], device=device)
    with poisoned(backend):
        actual = decode_attention(q, k_pool, v_pool, key_lengths=key_lengths, page_table=table)
    expected = exactly(attention, q, k, v, causal=True, key_lengths=key_lengths)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_many_new_tokens_equal_one_at_a_time(backend: str, seed: int, device: torch.device) -> None:
    """Verifying six drafts gives what six decode steps over the same cache give."""
    shape: Shape = ((34, 90), (6, 2), 64, 16)
    q, k, v = tensors(shape, 6, torch.float32, device)
    k_pool, v_pool, table = paged(k, v, list(shape[0]), 16)
    lengths = torch.tensor(shape[0], device=device)
    with poisoned(backend):
        together = decode_attention(q, k_pool, v_pool, key_lengths=lengths, page_table=table)
        for i in range(6):
            step = decode_attention(q[:, i : i + 1], k_pool, v_pool, key_lengths=lengths - 5 + i, page_table=table)
            torch.testing.assert_close(together[:, i], step[:, 0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_where_pages_lie_does_not_matter(backend: str, page_size: int, seed: int, device: torch.device) -> None:
    shape: Shape = ((300, 41), (7, 1), 64, page_size)
    q, k, v = tensors(shape, 3, torch.bfloat16, device)
    outputs = []
    for consecutive in (False, True):
        k_pool, v_pool, table = paged(k, v, list(shape[0]), page_size, consecutive)
        lengths = torch.tensor(shape[0], device=device)
        with poisoned(backend):
            outputs.append(decode_attention(q, k_pool, v_pool, key_lengths=lengths, page_table=table))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("new_tokens", [1, 2])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_extreme_scores(backend: str, new_tokens: int, seed: int, device: torch.device) -> None:
    """A score in the ten thousands picks its value exactly, however many pages lie before and after it."""
    shape: Shape = ((100,), (1, 1), 64, 16)
    _, k, v = tensors(shape, new_tokens, torch.float32, device)
    needle = 53
    k[0, needle] = 800 * k[0, needle].sign()
    q = k[:, needle : needle + 1].expand(1, new_tokens, 1, 64)
    k_pool, v_pool, table = paged(k, v, [100], 16)
    lengths = torch.tensor([100], device=device)
    with poisoned(backend):
        out = decode_attention(q, k_pool, v_pool, key_lengths=lengths, page_table=table)
        flat = decode_attention(q, k_pool, v_pool, key_lengths=lengths, page_table=table, scale=0.0)
    assert torch.equal(out, v[:, needle : needle + 1].expand_as(out))
    torch.testing.assert_close(flat[:, -1], v.mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_first_token_of_a_sequence(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    q, k, v = tensors(((1, 1), (4, 2), 32, 16), 1, dtype, device)
    k_pool, v_pool, table = paged(k, v, [1, 1], 16)
    with poisoned(backend):
        out = decode_attention(
            q, k_pool, v_pool, key_lengths=torch.ones(2, dtype=torch.int64, device=device), page_table=table
        )
    assert torch.equal(out, v.repeat_interleave(2, dim=2))


def test_wrong_shapes() -> None:
    pool, lengths, table = torch.zeros(4, 16, 2, 8), torch.tensor([9, 9]), torch.tensor([[0], [1]])
    for new_tokens in (0, MAX_NEW_TOKENS + 1):
        with pytest.raises(ValueError, match=f"1 to 8 new tokens, got {new_tokens}"):
            decode_attention(torch.zeros(2, new_tokens, 4, 8), pool, pool, key_lengths=lengths, page_table=table)
    q = torch.zeros(2, 1, 4, 8)
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 8\).*\(4, 16, 2, 8\)"):
        decode_attention(q[:, :, :3], pool, pool, key_lengths=lengths, page_table=table)
    with pytest.raises(ValueError, match=r"\(4, 16, 2, 8\), \(4, 16, 1, 8\)"):
        decode_attention(q, pool, pool[:, :, :1], key_lengths=lengths, page_table=table)
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        decode_attention(q, pool, pool, key_lengths=lengths[:1], page_table=table)
    with pytest.raises(ValueError, match=r"\(1, 1\)"):
        decode_attention(q, pool, pool, key_lengths=lengths, page_table=table[:1])
