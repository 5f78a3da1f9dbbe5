"""Writing rotated keys, and values, into pages: nothing else in the cache changes."""

from typing import Any

import pytest
import torch
from support.accuracy import DTYPES, UNREAD_PAGE, assert_accurate, backends, exactly, poisoned
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from afnext.bench.ops.guarded import guarded
from afnext.kernels import decode_attention as decode_module
from afnext.kernels import kv_write as module
from afnext.kernels import rotary as rotary_module
from afnext.kernels.attention import attention
from afnext.kernels.configs import targeting
from afnext.kernels.decode_attention import decode_attention
from afnext.kernels.kv_write import kv_write
from afnext.kernels.pages import page_slots
from afnext.kernels.rotary import Pairing, Rotation, rope_frequencies, rotary

BACKENDS = backends(module._operation, rotary_module._operation)
NATIVE = [backend for backend in BACKENDS if "native" in str(backend)]
E4M3 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127, E4M3: 448}
# tokens already there, new tokens, (heads, kv_heads), head_dim, rotated channels, page_size
SHAPES = [
    ((0,), 1, (1, 1), 16, 16, 16),
    ((0, 15, 16, 31), 1, (7, 1), 64, 64, 16),
    ((3, 14), 19, (4, 2), 128, 128, 16),
    ((250, 0), 13, (6, 3), 20, 14, 256),
]
Shape = tuple[tuple[int, ...], int, tuple[int, int], int, int, int]


def tensors(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    prefixes, time, (heads, kv_heads), head_dim, _, _ = shape
    q, k, v = (torch.randn(len(prefixes), time, n, head_dim) for n in (heads, kv_heads, kv_heads))
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def layout(shape: Shape, pairing: Pairing, device: torch.device) -> tuple[Tensor, Rotation, tuple[int, ...]]:
    """Slots of the new tokens in shuffled pages, their rotation, and the shape of the caches."""
    prefixes, time, (_, kv_heads), head_dim, width, page_size = shape
    counts = [-(-(prefix + time) // page_size) for prefix in prefixes]
    order = torch.randperm(sum(counts) + 2)
    table = torch.full((len(prefixes), max(counts) + 1), UNREAD_PAGE, dtype=torch.int32)
    for b, pages in enumerate(order[: sum(counts)].split(counts)):
        table[b, : counts[b]] = pages
    positions = torch.tensor(prefixes)[:, None] + torch.arange(time)
    slots = page_slots(table, positions, page_size)
    rotation = Rotation(positions.float().to(device), rope_frequencies(width, 15.3e6, device), pairing)
    return slots.to(device), rotation, (len(order), page_size, kv_heads, head_dim)


def plain_rotary(x: Tensor, rotation: Rotation) -> Tensor:
    pairs = rotation.frequencies.numel()
    half = rotation.pairing == "half"
    first, second = (
        (slice(pairs), slice(pairs, 2 * pairs)) if half else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
    )
    angles = rotation.positions[..., None, None] * rotation.frequencies
    a, b, out = x[..., first].float(), x[..., second].float(), x.float().clone()
    out[..., first] = a * angles.cos() - b * angles.sin()
    out[..., second] = b * angles.cos() + a * angles.sin()
    return out.to(x.dtype)


def test_reference_writes_what_qwen2_caches(seed: int) -> None:
    shape = SHAPES[2]
    q, k, v = tensors(shape, torch.float64, torch.device("cpu"))
    slots, rotation, cache_shape = layout(shape, "half", q.device)
    k_cache, v_cache = torch.full((2, *cache_shape), torch.nan, dtype=torch.float64)
    rotated = exactly(kv_write, q, k, v, k_cache=k_cache, v_cache=v_cache, slots=slots, rotation=rotation)
    angles = torch.cat((rotation.angles, rotation.angles), dim=-1).double()
    expected_q, expected_k = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin(), unsqueeze_dim=2)
    torch.testing.assert_close(rotated, expected_q, rtol=0, atol=1e-12)
    for b, row in enumerate(slots.tolist()):
        for t, slot in enumerate(row):
            page, offset = divmod(slot, shape[-1])
            torch.testing.assert_close(k_cache[page, offset], expected_k[b, t], rtol=0, atol=1e-12)
            assert torch.equal(v_cache[page, offset], v[b, t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(
    backend: str, shape: Shape, pairing: Pairing, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    q, k, v = tensors(shape, dtype, device)
    slots, rotation, cache_shape = layout(shape, pairing, device)
    k_cache, v_cache = torch.full((2, *cache_shape), torch.nan, dtype=dtype, device=device)
    before = q.clone(), k.clone(), v.clone()
    with poisoned(backend):
        rotated = kv_write(q, k, v, k_cache=k_cache, v_cache=v_cache, slots=slots, rotation=rotation)
    assert_accurate(rotated, exactly(rotary, q, rotation), plain_rotary(q, rotation))
    written = k_cache.flatten(0, 1)[slots]
    assert_accurate(written, exactly(rotary, k, rotation), plain_rotary(k, rotation))
    assert torch.equal(v_cache.flatten(0, 1)[slots], v)
    others = torch.ones(cache_shape[0] * cache_shape[1], dtype=torch.bool, device=device)
    others[slots.flatten()] = False
    assert k_cache.flatten(0, 1)[others].isnan().all(), "a key was written to a slot that was not named"
    assert v_cache.flatten(0, 1)[others].isnan().all(), "a value was written to a slot that was not named"
    assert all(torch.equal(*pair) for pair in zip(before, (q, k, v), strict=True)), "an input was changed"


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_cache_of_another_dtype(backend: str, seed: int, device: torch.device) -> None:
    """float32 keys and values into a bfloat16 cache are rounded once."""
    q, k, v = tensors(SHAPES[2], torch.float32, device)
    slots, rotation, cache_shape = layout(SHAPES[2], "half", device)
    k_cache, v_cache = torch.full((2, *cache_shape), torch.nan, dtype=torch.bfloat16, device=device)
    with poisoned(backend):
        rotated = kv_write(q, k, v, k_cache=k_cache, v_cache=v_cache, slots=slots, rotation=rotation)
    assert rotated.dtype == torch.float32
    written = k_cache.flatten(0, 1)[slots]
    assert_accurate(written, exactly(rotary, k, rotation), plain_rotary(k, rotation).to(torch.bfloat16))
    assert torch.equal(v_cache.flatten(0, 1)[slots], v.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", LARGEST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_codes_of_eight_bits(
    backend: str, shape: Shape, codes: torch.dtype, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    """Values are quantized bit for bit as by the formula; keys, whose rotation rounds, within half a step of it."""
    check_codes(backend, shape, codes, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend == "triton"])
def test_chips_without_e4m3_write_its_bits(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    with targeting("sm80"):
        check_codes(backend, SHAPES[3], E4M3, dtype, device)


def check_codes(backend: str, shape: Shape, codes: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = tensors(shape, dtype, device)
    v[:, :, 0] *= 1e-3
    slots, rotation, cache_shape = layout(shape, "half", device)
    caches = torch.full((2, *cache_shape), 0x80, dtype=torch.uint8, device=device)
    scales = torch.full((2, *cache_shape[:3]), torch.nan, device=device)
    with poisoned(backend):
        rotated = quantized_write(q, k, v, caches.view(codes), scales, slots, rotation)
    assert_accurate(rotated, exactly(rotary, q, rotation), plain_rotary(q, rotation))
    (keys, values), (k_scales, v_scales) = (x.flatten(1, 2)[:, slots] for x in (caches, scales))
    expected = v.float().abs().amax(-1) / LARGEST[codes]
    assert torch.equal(v_scales, expected)
    shares = v.float() / expected[..., None]
    assert torch.equal(values, (shares.round() if codes == torch.int8 else shares).to(codes).view(torch.uint8))
    exact = exactly(rotary, k, rotation)
    torch.testing.assert_close(k_scales.double(), exact.abs().amax(-1) / LARGEST[codes], rtol=2e-6, atol=0)
    steps = torch.ones_like(exact)
    if codes == E4M3:  # three bits of mantissa, and the same steps below 2^-6
        steps = 2.0 ** (exact.abs() / k_scales[..., None] * 1.00001).log2().floor().clamp(min=-6) / 8
    stored = keys.view(codes).double()
    assert ((stored * k_scales.double()[..., None] - exact).abs() <= 0.50002 * steps * k_scales[..., None]).all()
    assert stored.abs().amax(-1).eq(LARGEST[codes]).all()
    others = torch.ones(cache_shape[0] * cache_shape[1], dtype=torch.bool, device=device)
    others[slots.flatten()] = False
    assert (caches.flatten(1, 2)[:, others] == 0x80).all(), "something was written to a slot that was not named"
    assert scales.flatten(1, 2)[:, others].isnan().all(), "a scale was written to a slot that was not named"


def quantized_write(
    q: Tensor, k: Tensor, v: Tensor, caches: Tensor, scales: Tensor, slots: Tensor, rotation: Rotation
) -> Tensor:
    """`kv_write` into caches and scales that have keys and values stacked."""
    return kv_write(
        q,
        k,
        v,
        k_cache=caches[0],
        v_cache=caches[1],
        slots=slots,
        rotation=rotation,
        k_scales=scales[0],
        v_scales=scales[1],
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_int8_ties_and_zeros(backend: str, device: torch.device) -> None:
    """A scale of 1 shows that halves go to even; zeros have the scale 0; the largest value of either sign is 127."""
    rows = [[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5], [0.0] * 8, [-127, 126.5, -126.5, 3.49, -3.51, 0, 1, -1]]
    v = torch.tensor(rows, device=device)[None, :, None]
    caches, scales = torch.zeros(2, 1, 16, 1, 8, dtype=torch.int8, device=device), torch.ones(2, 1, 16, 1).to(device)
    rotation = Rotation(torch.zeros(1, 3, device=device), torch.ones(4, device=device))
    with poisoned(backend):
        quantized_write(v, v, v, caches, scales, torch.tensor([[4, 9, 2]], device=device), rotation)
    for kind in (0, 1):  # keys at position 0 are not turned
        assert scales[kind, 0, [4, 9, 2], 0].tolist() == [1, 0, 1]
        stored = caches[kind, 0, [4, 9, 2], 0].tolist()
        assert stored == [[127, 0, 2, 2, 0, -2, -2, 126], [0] * 8, [-127, 126, -126, 3, -4, 0, 1, -1]]


@pytest.mark.parametrize("chip", ["sm80", "sm90"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_fp8_ties_and_zeros(backend: str, chip: str, device: torch.device) -> None:
    """A scale of 1 shows that halves go to even, among numbers of any size; zeros have the scale 0."""
    row = [448, 17, 19, -27, 0.5 * 2**-9, -1.5 * 2**-9, 7.5 * 2**-9, -0.9 * 2**-9]
    v = torch.tensor([row, [0.0] * 8, [-x for x in row]], device=device)[None, :, None]
    caches = torch.zeros(2, 1, 16, 1, 8, dtype=torch.uint8, device=device).view(E4M3)
    scales = torch.ones(2, 1, 16, 1, device=device)
    rotation = Rotation(torch.zeros(1, 3, device=device), torch.ones(4, device=device))
    with poisoned(backend), targeting(chip):
        quantized_write(v, v, v, caches, scales, torch.tensor([[4, 9, 2]], device=device), rotation)
    expected = [448, 16, 20, -28, 0, -2 * 2**-9, 2**-6, -(2**-9)]
    for kind in (0, 1):  # keys at position 0 are not turned
        assert scales[kind, 0, [4, 9, 2], 0].tolist() == [1, 0, 1]
        stored = caches[kind, 0, :, 0].float()[[4, 9, 2]].tolist()
        assert stored == [expected, [0] * 8, [-x for x in expected]]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_strided_inputs(backend: str, seed: int, device: torch.device) -> None:
    """Queries, keys and values as slices of one fused projection, and with their channels apart."""
    shape = ((0, 15, 16, 31), 1, (7, 1), 64, 64, 16)
    fused = torch.randn(4, 1, 9, 64).to(device)
    slots, rotation, cache_shape = layout(shape, "half", device)
    parts = fused[:, :, :7], fused[:, :, 7:8], fused[:, :, 8:]
    apart = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in parts]
    results = []
    for q, k, v in (parts, apart, [part.contiguous() for part in parts]):
        caches = torch.zeros(2, *cache_shape, device=device)
        with poisoned(backend):
            out = kv_write(q, k, v, k_cache=caches[0], v_cache=caches[1], slots=slots, rotation=rotation)
        results.append((out, caches))
    for out, caches in results[:2]:
        assert torch.equal(out, results[2][0])
        assert torch.equal(caches, results[2][1])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_piece_by_piece_equals_at_once(backend: str, seed: int, device: torch.device) -> None:
    shape = SHAPES[2]
    q, k, v = tensors(shape, torch.bfloat16, device)
    slots, rotation, cache_shape = layout(shape, "half", device)
    at_once, pieces = torch.full((2, 2, *cache_shape), torch.nan, dtype=torch.bfloat16, device=device)
    with poisoned(backend):
        kv_write(q, k, v, k_cache=at_once[0], v_cache=at_once[1], slots=slots, rotation=rotation)
        for start, end in ((0, 1), (1, 9), (9, 18), (18, 19)):
            part = Rotation(rotation.positions[:, start:end], rotation.frequencies)
            kv_write(
                q[:, start:end],
                k[:, start:end],
                v[:, start:end],
                k_cache=pieces[0],
                v_cache=pieces[1],
                slots=slots[:, start:end],
                rotation=part,
            )
    assert torch.equal(at_once.nan_to_num(-1e9), pieces.nan_to_num(-1e9))


@pytest.mark.parametrize("backend", backends(module._operation, rotary_module._operation, decode_module._operation))
def test_written_then_attended(backend: str, seed: int, device: torch.device) -> None:
    """Tokens written a few at a time and attended by decoding equal causal attention with rotation over the whole."""
    length, page_size = 35, 16
    q, k, v = tensors(((0,), length, (4, 2), 32, 32, page_size), torch.float32, device)
    rotation = Rotation(torch.arange(float(length), device=device)[None], rope_frequencies(32, 15.3e6, device))
    expected = exactly(attention, q, k, v, causal=True, rotation=rotation, key_rotation=rotation)
    k_cache, v_cache = torch.full((2, 4, page_size, 2, 32), torch.nan, device=device)
    table = torch.tensor([[3, 0, 2]], dtype=torch.int32, device=device)
    start = 0
    for count in (1, 1, 3, 8, 2, 5, 1, 8, 6):
        new = torch.arange(start, start + count, device=device)
        start += count
        here = Rotation(rotation.positions[:, new], rotation.frequencies)
        step = (x[:, new] for x in (q, k, v))
        slots = page_slots(table, new[None], page_size)
        with poisoned(backend):
            turned = kv_write(*step, k_cache=k_cache, v_cache=v_cache, slots=slots, rotation=here)
            out = decode_attention(
                turned, k_cache, v_cache, key_lengths=torch.tensor([start], device=device), page_table=table
            )
        torch.testing.assert_close(out.double(), expected[:, new], rtol=0, atol=5e-6)
    assert start == length


@pytest.mark.parametrize("dtype", [torch.bfloat16, *LARGEST])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("backend", NATIVE)
def test_native_stays_within_its_memory(
    backend: str, threads: int, dtype: torch.dtype, seed: int, restored_threads: None
) -> None:
    """Tensors that end where memory ends, the last slot among those written; any number of threads gives the same."""
    shape: Shape = ((16, 0), 110, (5, 2), 67, 66, 7)
    new = tensors(shape, torch.bfloat16, torch.device("cpu"))
    slots, rotation, cache_shape = layout(shape, "half", torch.device("cpu"))
    last = cache_shape[0] * cache_shape[1] - 1
    slots[0, 3] = slots[0, 3] if last in slots else last
    outputs = []
    for count, place in ((1, torch.clone), (threads, guarded)):
        torch.set_num_threads(count)
        written = [place(torch.zeros(cache_shape, dtype=dtype)) for _ in range(2)]
        scales = [place(torch.zeros(cache_shape[:3])) for _ in range(2)] if dtype in LARGEST else [None, None]
        options = dict(zip(("k_cache", "v_cache", "k_scales", "v_scales"), written + scales, strict=True))
        with poisoned(backend):
            turned = kv_write(*map(place, new), **options, slots=place(slots), rotation=rotation)
        outputs.append([turned, *(x.view(torch.uint8) for x in written), *(scales if dtype in LARGEST else [])])
    for alone, shared in zip(*outputs, strict=True):
        assert torch.equal(alone, shared)


@pytest.mark.parametrize("slot", [-1, 5 * 16])
@pytest.mark.parametrize("backend", NATIVE)
def test_native_writes_to_no_slot_that_is_not_there(backend: str, slot: int) -> None:
    q, cache = torch.zeros(1, 2, 4, 8), torch.zeros(5, 16, 4, 8)
    slots, rotation = torch.tensor([[3, slot]]), Rotation(torch.zeros(1, 2), torch.ones(4))
    with poisoned(backend), pytest.raises(IndexError, match=str(slot)):
        kv_write(q, q, q, k_cache=cache, v_cache=cache, slots=slots, rotation=rotation)


def test_wrong_shapes() -> None:
    q, k = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 8)
    cache, slots = torch.zeros(5, 16, 2, 8), torch.arange(6).view(2, 3)
    rotation = Rotation(torch.zeros(2, 3), torch.ones(4))
    good: dict[str, Any] = {"k_cache": cache, "v_cache": cache.clone(), "slots": slots, "rotation": rotation}
    with pytest.raises(ValueError, match=r"\(2, 3, 2, 8\).*\(2, 3, 1, 8\)"):
        kv_write(q, k, k[:, :, :1], **good)
    with pytest.raises(ValueError, match=r"\(2, 3, 1, 8\).*\(5, 16, 2, 8\)"):
        kv_write(q, k[:, :, :1], k[:, :, :1], **good)
    with pytest.raises(ValueError, match=r"\(5, 16, 2, 8\).*\(4, 16, 2, 8\)"):
        kv_write(q, k, k, **{**good, "v_cache": cache[:4]})
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        kv_write(q, k, k, **{**good, "slots": slots[:, :2]})
    with pytest.raises(ValueError, match="contiguous"):
        kv_write(q, k, k, **{**good, "v_cache": torch.zeros(16, 5, 2, 8).transpose(0, 1)})
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2, 4, 8\)"):
        kv_write(q[:, :2], k, k, **good)
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3, 4, 8\)"):
        kv_write(q, k, k, **{**good, "rotation": Rotation(torch.zeros(2, 4), torch.ones(4))})
    int8 = {"k_cache": cache.char(), "v_cache": cache.char()}
    scales = torch.zeros(5, 16, 2)
    with pytest.raises(ValueError, match=r"int8 caches.*float32"):
        kv_write(q, k, k, **good, k_scales=scales, v_scales=scales)
    with pytest.raises(ValueError, match=r"int8 caches.*int8"):
        kv_write(q, k, k, **{**good, **int8}, k_scales=scales)
    with pytest.raises(ValueError, match=r"\(5, 16, 2\).*\(5, 16\)"):
        kv_write(q, k, k, **{**good, **int8}, k_scales=scales, v_scales=scales[..., 0])
    with pytest.raises(ValueError, match=r"float32.*float64"):
        kv_write(q, k, k, **{**good, **int8}, k_scales=scales, v_scales=scales.double())
    with pytest.raises(ValueError, match="contiguous"):
        kv_write(q, k, k, **{**good, **int8}, k_scales=scales, v_scales=torch.zeros(16, 5, 2).transpose(0, 1))
