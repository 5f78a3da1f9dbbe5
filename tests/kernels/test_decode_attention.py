"""Decode attention: what causal attention gives for the newest tokens, on every backend."""

import pytest
import torch
from support.accuracy import (
    DTYPES,
    assert_accurate,
    backends,
    exactly,
    far_apart,
    paged,
    poisoned,
    without_races,
)
from torch import Tensor

from afnext.bench.ops.guarded import guarded
from afnext.kernels import decode_attention as module
from afnext.kernels.attention import attention
from afnext.kernels.configs import targeting
from afnext.kernels.decode_attention import MAX_NEW_TOKENS, decode_attention, split_count

BACKENDS = backends(module._operation)
NATIVE = [backend for backend in BACKENDS if "native" in str(backend)]
E4M3 = torch.float8_e4m3fn
CODES = (torch.int8, E4M3)
# key lengths, (heads, kv_heads), head_dim, page_size
SHAPES = [
    (tuple(range(8, 24)), (1, 1), 16, 16),
    ((15, 16, 33), (7, 1), 64, 16),
    ((129, 8, 64), (4, 2), 32, 64),
    ((171,), (14, 2), 128, 128),
    ((97, 41), (8, 2), 24, 16),
]
Shape = tuple[tuple[int, ...], tuple[int, int], int, int]


def tensors(shape: Shape, new_tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, and dense k, v as long as the longest sequence."""
    lengths, (heads, kv_heads), head_dim, _ = shape
    q = torch.randn(len(lengths), new_tokens, heads, head_dim)
    k, v = torch.randn(2, len(lengths), max(lengths), kv_heads, head_dim)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def quantized(x: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes with a scale for each token and head: [..., head_dim] to codes alike and [...] float32. Keeps NaN."""
    scales = x.float().abs().amax(-1) / (127 if codes == torch.int8 else 448)
    shares = (x / scales[..., None]).where(scales[..., None] != 0, 0)
    return (shares.nan_to_num(77).round() if codes == torch.int8 else shares).to(codes), scales


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
@pytest.mark.parametrize("new_tokens", [1, 8])
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("shape", SHAPES[1::2], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_of_eight_bits(
    backend: str, shape: Shape, codes: torch.dtype, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    """Magnitudes differ a thousandfold from token to token and head to head, and some vectors are zero."""
    check_codes(backend, shape, codes, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("chip", ["sm80", "sm90"])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend == "triton"])
def test_codes_on_every_kind_of_chip(
    backend: str, chip: str, codes: torch.dtype, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    with targeting(chip):
        check_codes(backend, SHAPES[3], codes, dtype, device)


def check_codes(backend: str, shape: Shape, codes: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    lengths, _, _, page_size = shape
    q, k, v = tensors(shape, 3, dtype, device)
    k, v = (x.float() * 10 ** torch.empty(*x.shape[:3], 1, device=device).uniform_(-3, 0) for x in (k, v))
    k[:, ::7] = v[:, ::5] = 0
    k_pool, v_pool, table = paged(k, v, list(lengths), page_size)
    (k_pool, k_scales), (v_pool, v_scales) = quantized(k_pool, codes), quantized(v_pool, codes)
    key_lengths = torch.tensor(lengths, device=device)
    with poisoned(backend):
        actual = decode_attention(
            q,
            k_pool,
            v_pool,
            key_lengths=key_lengths,
            page_table=table,
            k_scales=k_scales,
            v_scales=v_scales,
        )
    k, v = (x.double() * scales.double()[..., None] for x, scales in (quantized(k, codes), quantized(v, codes)))
    exact = exactly(attention, q, k, v, causal=True, key_lengths=key_lengths)
    assert_accurate(actual, exact, plain(q, k.to(dtype), v.to(dtype), lengths))


@pytest.mark.parametrize("programs", [1, 8, 13, 40])
def test_division_among_multiprocessors(
    programs: int, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into one part, two, three and as many as there are blocks of keys; for the shortest some have nothing to do."""
    if "triton" not in module._operation.implementations:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(module, "multiprocessors", lambda _: programs)
    monkeypatch.setattr(module, "PROGRAMS", 1)
    shape: Shape = ((2, 330, 65, 190), (3, 1), 32, 16)
    q, k, v = tensors(shape, 2, torch.float32, device)
    k_pool, v_pool, table = paged(k, v, list(shape[0]), 16)
    key_lengths = torch.tensor(shape[0], device=device)
    with poisoned("triton"):
        actual = decode_attention(q, k_pool, v_pool, key_lengths=key_lengths, page_table=table)
    expected = exactly(attention, q, k, v, causal=True, key_lengths=key_lengths)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


def test_split_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits at one time, at least one part and at most one for each block of keys."""
    monkeypatch.setattr(module, "multiprocessors", lambda _: 132)
    counts = [split_count(torch.device("cpu"), *of) for of in ((4, 704), (4, 8), (32, 704), (33, 704), (400, 704))]
    assert counts == [66, 8, 8, 8, 1]


@pytest.mark.parametrize("new_tokens", range(1, MAX_NEW_TOKENS + 1))
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_causal_attention(backend: str, new_tokens: int, seed: int, device: torch.device) -> None:
    """Over the same pages; one sequence holds nothing but its new tokens."""
    shape: Shape = ((70, new_tokens, 16), (4, 2), 32, 16)
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
    shape: Shape = ((34, 90), (3, 1), 64, 16)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str, seed: int, device: torch.device) -> None:
    """Pools that are a part of larger ones, of keys and values side by side; queries cut out of a fused projection."""
    shape: Shape = ((40, 21), (4, 2), 32, 16)
    q, k, v = tensors(shape, 2, torch.float32, device)
    k_pool, v_pool, table = paged(k, v, list(shape[0]), 16)
    side_by_side = torch.stack((k_pool, v_pool), 3)
    fused = torch.cat((k[:, :2], q, v[:, :2]), 2)
    lengths = torch.tensor(shape[0], device=device)
    with poisoned(backend):
        expected = decode_attention(q, k_pool, v_pool, key_lengths=lengths, page_table=table)
        actual = decode_attention(
            fused[:, :, 2:6],
            *side_by_side.unbind(3),
            key_lengths=torch.stack((lengths, lengths), 1)[:, 0],
            page_table=torch.stack((table, table), 2)[..., 0],
        )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_beyond_two_to_the_31(
    backend: str, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third page begins 2^31 elements after the first; nothing between is touched."""
    k, v = far_apart(3, 16, device)
    keys, values, tokens = k.contiguous(), v.contiguous(), k.shape[1]
    q = torch.randn(3, 2, 2, 16).to(device, torch.float16)
    table = torch.tensor([[1], [0], [2]], dtype=torch.int32, device=device)
    lengths = torch.full((3,), tokens, device=device)
    without_races(backend, device, monkeypatch)
    with poisoned(backend):
        actual = decode_attention(q, k, v, key_lengths=lengths, page_table=table)
    order = [1, 0, 2]
    expected = exactly(attention, q, keys[order], values[order], causal=True)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize("codes", [None, *CODES])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("new_tokens", [1, 7])
@pytest.mark.parametrize("backend", NATIVE)
def test_native_over_many_parts(
    backend: str, new_tokens: int, threads: int, codes: torch.dtype | None, seed: int, restored_threads: None
) -> None:
    """Sequences of less than one part, whole parts and one token more, in tensors that end where memory ends."""
    shape: Shape = ((1100, 1024, 1025, 9), (14, 2), 64, 64)
    q, k, v = tensors(shape, new_tokens, torch.bfloat16, torch.device("cpu"))
    k_pool, v_pool, table = paged(k, v, list(shape[0]), 64)
    scales: dict[str, Tensor] = {}
    exact_k, exact_v = k.double(), v.double()
    if codes is not None:
        (k_pool, k_scales), (v_pool, v_scales) = quantized(k_pool, codes), quantized(v_pool, codes)
        scales = {"k_scales": guarded(k_scales), "v_scales": guarded(v_scales)}
        exact_k, exact_v = (
            x.double() * scale.double()[..., None] for x, scale in (quantized(k, codes), quantized(v, codes))
        )
    key_lengths = torch.tensor(shape[0])
    torch.set_num_threads(threads)
    with poisoned(backend):
        actual = decode_attention(
            guarded(q),
            guarded(k_pool),
            guarded(v_pool),
            key_lengths=guarded(key_lengths),
            page_table=guarded(table),
            **scales,
        )
        torch.set_num_threads(1)
        alone = decode_attention(q, k_pool, v_pool, key_lengths=key_lengths, page_table=table, **scales)
    assert torch.equal(actual, alone)
    exact = exactly(attention, q, exact_k, exact_v, causal=True, key_lengths=key_lengths)
    assert_accurate(actual, exact, plain(q, k, v, shape[0]))


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
    integers, scales = pool.to(torch.int8), torch.zeros(4, 16, 2)
    with pytest.raises(ValueError, match=r"fp8 with scales; got torch\.int8"):
        decode_attention(q, integers, integers, key_lengths=lengths, page_table=table)
    with pytest.raises(ValueError, match=r"fp8 with scales; got torch\.float32"):
        decode_attention(q, pool, pool, key_lengths=lengths, page_table=table, k_scales=scales, v_scales=scales)
    with pytest.raises(ValueError, match=r"float32 of the shape \(4, 16, 2\).*\(4, 16, 1\)"):
        decode_attention(
            q, integers, integers, key_lengths=lengths, page_table=table, k_scales=scales, v_scales=scales[..., :1]
        )
