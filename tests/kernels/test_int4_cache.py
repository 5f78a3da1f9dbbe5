"""Keys and values in four bits: what is stored, what attention makes of it, and that a bias costs no precision."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import DTYPES, assert_accurate, backends, exactly, paged, poisoned
from torch import Tensor

from afnext.bench.ops.guarded import guarded
from afnext.kernels import attention as attention_module
from afnext.kernels import decode_attention as decode_module
from afnext.kernels import kv_write as write_module
from afnext.kernels import rotary as rotary_module
from afnext.kernels.attention import attention
from afnext.kernels.decode_attention import decode_attention
from afnext.kernels.int4_cache import HEAD_DIMS, KeyBias, dequantize_int4, quantize_int4
from afnext.kernels.kv_write import kv_write
from afnext.kernels.pages import page_slots
from afnext.kernels.rotary import Rotation, rope_frequencies, rotary

WRITERS = backends(write_module._operation, rotary_module._operation)
READERS = backends(attention_module._operation, decode_module._operation)
NATIVE = [backend for backend in READERS if "native" in str(backend)]
THETA = 15.3e6
# key lengths, new tokens, (heads, kv_heads), head_dim, page_size
SHAPES = [
    ((8, 20), 1, (7, 1), 64, 16),
    ((70, 17), 3, (4, 2), 32, 64),
    ((171,), 1, (14, 2), 128, 128),
    ((45, 30), 12, (6, 3), 32, 16),
]
Shape = tuple[tuple[int, ...], int, tuple[int, int], int, int]


def hadamard(channels: int) -> Tensor:
    """[channels, channels] float64, from its definition by Kronecker products."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < channels:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def read(codes: Tensor, scales: Tensor) -> Tensor:
    """What is stored, in float64."""
    unpacked = torch.cat((codes % 16, codes // 16), -1).double()
    return (2 * unpacked - 15) @ hadamard(unpacked.shape[-1]).to(codes.device) * scales.double()[..., None]


@settings(max_examples=20)
@given(
    channels=st.sampled_from(HEAD_DIMS),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-20, 20),
    outliers=st.integers(0, 8),
)
def test_what_is_read_is_within_half_a_step(channels: int, seed: int, exponent: int, outliers: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, channels, generator=generator)
    x[..., torch.randperm(channels, generator=generator)[:outliers]] *= 100
    x[0, 0] = 0
    x *= 2.0**exponent
    codes, scales = quantize_int4(x)
    assert (codes.shape, codes.dtype) == ((5, 3, channels // 2), torch.uint8)
    transformed = x.double() @ hadamard(channels)
    step = transformed.abs().amax(-1) / 8
    torch.testing.assert_close(scales.double(), step / (2 * channels), rtol=1e-5, atol=0)
    assert scales[0, 0] == 0
    stored = read(codes, scales)
    assert ((stored @ hadamard(channels) - transformed).abs() <= 0.50002 * step[..., None]).all()
    torch.testing.assert_close(dequantize_int4(codes, scales, torch.float64), stored, rtol=1e-6, atol=0)


@dataclass
class Written:
    """A cache after one call of `kv_write`, and what was given."""

    k: Tensor
    v: Tensor
    codes: Tensor
    scales: Tensor
    slots: Tensor
    rotation: Rotation


def written(backend: str, dtype: torch.dtype, device: torch.device, k_bias: Tensor | None, head_dim: int) -> Written:
    """12 tokens, at indices 5 and 11 on, in shuffled pages."""
    q, k, v = (torch.randn(2, 12, heads, head_dim).to(device, dtype) for heads in (6, 2, 2))
    if k_bias is not None:
        k = (k.double() + k_bias.double()).to(dtype)
    positions = torch.tensor([[5], [11]]) + torch.arange(12)
    table = torch.randperm(8)[:6].view(2, 3)
    slots = page_slots(table, positions, 16).to(device)
    rotation = Rotation(positions.float().to(device), rope_frequencies(head_dim, THETA, device))
    codes = torch.full((2, 8, 16, 2, head_dim // 2), 3, dtype=torch.uint8, device=device)
    scales = torch.full((2, 8, 16, 2), torch.nan, device=device)
    with poisoned(backend):
        kv_write(
            q,
            k,
            v,
            k_cache=codes[0],
            v_cache=codes[1],
            slots=slots,
            rotation=rotation,
            k_scales=scales[0],
            v_scales=scales[1],
            k_bias=k_bias,
        )
    return Written(k, v, codes, scales, slots, rotation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", ["reference", *WRITERS])
def test_writing(backend: str, biased: bool, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    """Values are stored as `quantize_int4` says, keys, whose rotation rounds, within half a step of what they are."""
    bias = torch.randn(2, 64).to(device, dtype) * 50 if biased else None
    given = written(backend, dtype, device, bias, 64)
    (keys, values), (k_scales, v_scales) = (x.flatten(1, 2)[:, given.slots] for x in (given.codes, given.scales))
    expected = quantize_int4(given.v)
    assert torch.equal(values, expected[0])
    assert torch.equal(v_scales, expected[1])
    unbiased = given.k.double() - (0 if bias is None else bias.double())
    exact = exactly(rotary, unbiased, given.rotation) @ hadamard(64).to(device)
    step = exact.abs().amax(-1) / 8
    torch.testing.assert_close(k_scales.double(), step / 128, rtol=1e-5, atol=0)
    assert ((read(keys, k_scales) @ hadamard(64).to(device) - exact).abs() <= 0.502 * step[..., None]).all()
    others = torch.ones(8 * 16, dtype=torch.bool, device=device)
    others[given.slots.flatten()] = False
    assert (given.codes.flatten(1, 2)[:, others] == 3).all(), "something was written to a slot that was not named"
    assert given.scales.flatten(1, 2)[:, others].isnan().all(), "a scale was written to a slot that was not named"


@dataclass
class Stored:
    """An int4 cache, and the dense keys and values that it stands for, in float64."""

    q: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    arguments: dict[str, Tensor | KeyBias | None]


def stored(shape: Shape, biased: bool, dtype: torch.dtype, device: torch.device) -> Stored:
    """Magnitudes differ a thousandfold from token to token and head to head, and some vectors are zero."""
    lengths, new_tokens, (heads, kv_heads), head_dim, page_size = shape
    q = torch.randn(len(lengths), new_tokens, heads, head_dim).to(device, dtype)
    k, v = torch.randn(2, len(lengths), max(lengths), kv_heads, head_dim)
    k, v = (x * 10 ** torch.empty(*x.shape[:3], 1).uniform_(-3, 0) for x in (k, v))
    k[:, ::7] = v[:, ::5] = 0
    (k_codes, k_scales), (v_codes, v_scales) = quantize_int4(k), quantize_int4(v)
    k_pool, v_pool, table = paged(k_scales, v_scales, list(lengths), page_size)  # NaN where there is no token
    codes = [torch.full((*k_pool.shape, head_dim // 2), 77, dtype=torch.uint8) for _ in range(2)]
    for b, length in enumerate(lengths):
        slots = page_slots(table[b : b + 1], torch.arange(length)[None], page_size)[0]
        for pool, dense in zip(codes, (k_codes, v_codes), strict=True):
            pool.flatten(0, 1)[slots] = dense[b, :length]
    keys, values = read(k_codes, k_scales), read(v_codes, v_scales)
    bias = None
    if biased:
        angles = torch.arange(max(lengths))[:, None] * rope_frequencies(head_dim, THETA)
        bias = KeyBias(torch.randn(kv_heads, head_dim).to(dtype), angles.cos(), angles.sin())
        rotation = Rotation(torch.arange(max(lengths))[None].float(), rope_frequencies(head_dim, THETA))
        keys = keys + exactly(rotary, bias.bias.double().expand(1, max(lengths), -1, -1), rotation)
        bias = KeyBias(*(x.to(device) for x in (bias.bias, bias.cos, bias.sin)))
    arguments = {
        "k": codes[0].to(device),
        "v": codes[1].to(device),
        "k_scales": k_pool.to(device),
        "v_scales": v_pool.to(device),
        "key_lengths": torch.tensor(lengths, device=device),
        "page_table": table.to(device),
        "key_bias": bias,
    }
    return Stored(q, keys.to(device), values.to(device), torch.tensor(lengths, device=device), arguments)


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Scores, softmax and sum as written, in the dtype of q, one sequence at a time."""
    outputs = []
    for b, length in enumerate(lengths.tolist()):
        keys, values = k[b, :length].to(q.dtype), v[b, :length].to(q.dtype)
        grouped = q[b].unflatten(1, (k.shape[2], -1))
        scores = torch.einsum("nhgd,khd->hgnk", grouped, keys) * q.shape[-1] ** -0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(length - q.shape[1] + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hgnk,khd->nhgd", weights, values).flatten(1, 2))
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", READERS)
def test_reading(backend: str, shape: Shape, biased: bool, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    """Few new tokens by decode attention, many by attention; pages are shuffled."""
    cache = stored(shape, biased, dtype, device)
    few = cache.q.shape[1] <= decode_module.MAX_NEW_TOKENS
    with poisoned(backend):
        actual = (decode_attention if few else attention)(
            cache.q, **cache.arguments, **({} if few else {"causal": True})
        )
    exact = exactly(attention, cache.q, cache.keys, cache.values, causal=True, key_lengths=cache.lengths)
    assert_accurate(actual, exact, plain(cache.q, cache.keys, cache.values, cache.lengths))


@pytest.mark.parametrize("shape", SHAPES[1::2], ids=str)
def test_the_reference_reads_what_is_stored(shape: Shape, seed: int, device: torch.device) -> None:
    cache = stored(shape, True, torch.float64, device)
    with poisoned("reference"):
        found = attention(cache.q, **cache.arguments, causal=True)
    expected = exactly(attention, cache.q, cache.keys, cache.values, causal=True, key_lengths=cache.lengths)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", READERS)
def test_keys_of_all_sequences_without_a_mask(backend: str, seed: int, device: torch.device) -> None:
    if "triton" in str(backend):
        pytest.skip("the Triton kernel of int4 caches is causal")
    cache = stored(SHAPES[3], True, torch.float32, device)
    with poisoned(backend):
        found = attention(cache.q, **cache.arguments)
    expected = exactly(attention, cache.q, cache.keys, cache.values, key_lengths=cache.lengths)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("backend", NATIVE)
def test_native_stays_within_its_memory(
    backend: str, threads: int, shape: Shape, seed: int, restored_threads: None
) -> None:
    """Tensors that end where memory ends; any number of threads gives the same."""
    cache = stored(shape, True, torch.bfloat16, torch.device("cpu"))
    few = cache.q.shape[1] <= decode_module.MAX_NEW_TOKENS
    outputs = []
    for count, place in ((1, torch.clone), (threads, guarded)):
        torch.set_num_threads(count)
        arguments = {name: x if isinstance(x, KeyBias) else place(x) for name, x in cache.arguments.items()}
        bias = cache.arguments["key_bias"]
        arguments["key_bias"] = KeyBias(place(bias.bias), place(bias.cos), place(bias.sin))
        with poisoned(backend):
            outputs.append(
                (decode_attention if few else attention)(
                    place(cache.q), **arguments, **({} if few else {"causal": True})
                )
            )
    assert torch.equal(*outputs)


@pytest.mark.parametrize("backend", [backend for backend in READERS if backend in WRITERS])
def test_a_large_bias_costs_no_precision(backend: str, seed: int, device: torch.device) -> None:
    """Keys as Qwen2.5 has them, a bias of a hundred in some channels: written and attended, the error is that of the
    same keys without the bias, where four bits of the sum would lose nearly everything."""
    length, heads, head_dim, page_size = 33, 2, 64, 16
    k, v = torch.randn(2, 1, length, 1, head_dim, device=device)
    q = torch.randn(1, length, heads, head_dim, device=device)
    bias = torch.zeros(1, head_dim, device=device)
    bias[0, torch.randperm(head_dim)[:6]] = torch.tensor([150.0, -90, 60, -140, 30, 110], device=device)
    rotation = Rotation(torch.arange(float(length), device=device)[None], rope_frequencies(head_dim, THETA, device))
    table = torch.tensor([[3, 0, 2]], dtype=torch.int32, device=device)
    slots = page_slots(table, torch.arange(length, device=device)[None], page_size)
    scale = 0.02  # weights that no single key dominates

    def error(given: Tensor, taken: Tensor) -> float:
        keys = k + given
        expected = exactly(attention, q, keys, v, causal=True, rotation=rotation, key_rotation=rotation, scale=scale)
        codes = torch.zeros(2, 4, page_size, 1, head_dim // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(2, 4, page_size, 1, device=device)
        cos, sin = (x[0, :, 0] for x in rotation.cos_sin)
        with poisoned(backend):
            turned = kv_write(
                q,
                keys,
                v,
                k_cache=codes[0],
                v_cache=codes[1],
                slots=slots,
                rotation=rotation,
                k_scales=scales[0],
                v_scales=scales[1],
                k_bias=taken,
            )
            found = attention(
                turned,
                codes[0],
                codes[1],
                causal=True,
                scale=scale,
                key_lengths=torch.tensor([length], device=device),
                page_table=table,
                k_scales=scales[0],
                v_scales=scales[1],
                key_bias=KeyBias(taken, cos, sin),
            )
        return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    none = torch.zeros_like(bias)
    without, with_bias, ignored = error(none, none), error(bias, bias), error(bias, none)
    assert without < 0.2
    assert with_bias < 1.5 * without
    assert ignored > 1.5 * with_bias


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", *NATIVE[-1:]])
def test_forty_five_thousand_tokens(backend: str, seed: int, device: torch.device) -> None:
    """The last tokens of thirty minutes, with keys as Qwen2.5 has them: as close to what the same keys and values give
    unrounded as int8 is without the bias, times the ratio of their steps."""
    length, head_dim, page_size = 45_000, 128, 256
    k, v = torch.randn(2, 1, length, 1, head_dim)
    bias = torch.zeros(1, head_dim)
    bias[0, torch.randperm(head_dim)[:8]] = torch.empty(8).uniform_(-167, 167)
    rotation = Rotation(torch.arange(float(length))[None], rope_frequencies(head_dim, THETA))
    q = torch.randn(1, 4, 7, head_dim)
    pages = -(-length // page_size)
    table = torch.randperm(pages, dtype=torch.int32)[None]
    slots = page_slots(table, torch.arange(length)[None], page_size)
    cos, sin = (x[0, :, 0].contiguous() for x in rotation.cos_sin)

    def answer(codes: Tensor, taken: Tensor | None, keys: Tensor) -> Tensor:
        scales = torch.zeros(2, pages, page_size, 1)
        with poisoned(backend):
            for start in range(0, length, 5000):
                part = slice(start, start + 5000)
                turned = kv_write(
                    q.new_zeros(1, len(slots[0, part]), 7, head_dim),
                    keys[:, part],
                    v[:, part],
                    k_cache=codes[0],
                    v_cache=codes[1],
                    slots=slots[:, part],
                    rotation=Rotation(rotation.positions[:, part], rotation.frequencies),
                    k_scales=scales[0],
                    v_scales=scales[1],
                    k_bias=taken,
                )
            assert turned.shape[1] == 5000
            return decode_attention(
                rotary(q, Rotation(rotation.positions[:, -4:], rotation.frequencies)),
                codes[0],
                codes[1],
                scale=0.02,
                key_lengths=torch.tensor([length]),
                page_table=table,
                k_scales=scales[0],
                v_scales=scales[1],
                key_bias=None if taken is None else KeyBias(taken, cos, sin),
            )

    def error(found: Tensor, keys: Tensor) -> float:
        turned = rotary(q.double(), Rotation(rotation.positions[:, -4:], rotation.frequencies))
        expected = exactly(attention, turned, rotary(keys.double(), rotation), v, causal=True, scale=0.02)
        return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    pool = (2, pages, page_size, 1)
    int4 = error(answer(torch.zeros(*pool, head_dim // 2, dtype=torch.uint8), bias, k + bias), k + bias)
    int8 = error(answer(torch.zeros(*pool, head_dim, dtype=torch.int8), None, k), k)
    assert int4 <= 1.2 * int8 * 127 / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_bias": KeyBias(torch.zeros(2, 32), torch.zeros(64, 8), torch.zeros(64, 8))}, "key_bias"),
        ({"k_scales": None}, "int4, int8 or fp8 with scales"),
        ({"v": torch.zeros(9, 16, 2, 32, dtype=torch.uint8)}, "alike"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    cache = stored(((60, 41), 19, (6, 2), 32, 16), False, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        attention(cache.q, **{**cache.arguments, **change}, causal=True)  # type: ignore[arg-type]


def test_heads_that_cannot_be_stored_are_refused() -> None:
    q, cache = torch.zeros(1, 1, 1, 48), torch.zeros(1, 16, 1, 24, dtype=torch.uint8)
    scales, rotation = torch.zeros(1, 16, 1), Rotation(torch.zeros(1, 1), torch.ones(24))
    slots = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="16, 32, 64, 128, 256, 512 channels, got 48"):
        kv_write(
            q, q, q, k_cache=cache, v_cache=cache, slots=slots, rotation=rotation, k_scales=scales, v_scales=scales
        )
