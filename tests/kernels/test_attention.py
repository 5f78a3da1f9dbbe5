"""Attention against torch's own, dense and paged; every backend against the float64 reference."""

import math
from dataclasses import dataclass

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
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from afnext.bench.ops.guarded import guarded
from afnext.kernels import attention as module
from afnext.kernels import rotary as rotary_module
from afnext.kernels.attention import attention
from afnext.kernels.configs import targeting
from afnext.kernels.rotary import Pairing, Rotation, rope_frequencies, rotary

BACKENDS = backends(module._operation)
NATIVE = [backend for backend in BACKENDS if "native" in str(backend)]
WITH_ROTATION = backends(module._operation, rotary_module._operation)


@dataclass(frozen=True)
class Case:
    """A problem; `lengths` are the key lengths, and the dense keys are as many as the longest one."""

    lengths: tuple[int, ...]
    queries: int
    heads: tuple[int, int]
    head_dim: int
    causal: bool
    page_size: int | None = None

    def __str__(self) -> str:
        kind = f"{'causal' if self.causal else 'full'}-{self.page_size or 'dense'}"
        return f"{kind}-q{self.queries}-k{'+'.join(map(str, self.lengths))}-h{self.heads}-d{self.head_dim}"

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Dense q, k, v; keys and values past the end of a sequence are large but finite."""
        batch, keys = len(self.lengths), max(self.lengths)
        q = torch.randn(batch, self.queries, self.heads[0], self.head_dim)
        k, v = torch.randn(2, batch, keys, self.heads[1], self.head_dim)
        for b, length in enumerate(self.lengths):
            k[b, length:], v[b, length:] = 1000, 1000
        return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


CASES = [
    # the encoder: bidirectional, padded to the longest window
    Case((1,), 1, (1, 1), 16, causal=False),
    Case((13, 13), 13, (3, 3), 64, causal=False),
    Case((1, 7, 131), 131, (2, 2), 64, causal=False),
    Case((17, 5), 11, (4, 2), 24, causal=False),
    # prefill without a prefix, then behind one
    Case((1,), 1, (7, 1), 128, causal=True),
    Case((37,), 37, (4, 4), 32, causal=True),
    Case((40, 5, 23), 5, (4, 1), 64, causal=True),
    # prefill into pages: ends before, on and after the edges of pages
    Case((5, 16, 17, 33), 5, (7, 1), 64, causal=True, page_size=16),
    Case((31, 32), 31, (14, 2), 16, causal=True, page_size=16),
    Case((255, 256, 257), 3, (8, 2), 32, causal=True, page_size=256),
    Case((300,), 70, (14, 2), 128, causal=True, page_size=256),
    Case((19, 3), 7, (2, 1), 64, causal=False, page_size=16),
]


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, scale: float | None = None) -> Tensor:
    """Scores, softmax and sum as written, in the dtype of q, one sequence at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for b, length in enumerate(lengths):
        keys, values = (x[b, :length].repeat_interleave(q.shape[2] // x.shape[2], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[b], keys) * scale
        if causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(length - q.shape[1] + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.stack(outputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_agrees_with_torch(case: Case, seed: int) -> None:
    q, k, v = case.tensors(torch.float64, torch.device("cpu"))
    lengths = torch.tensor(case.lengths)
    if case.page_size is None:
        actual = exactly(attention, q, k, v, causal=case.causal, key_lengths=lengths)
    else:
        k_pool, v_pool, table = paged(k, v, list(case.lengths), case.page_size)
        actual = exactly(attention, q, k_pool, v_pool, causal=case.causal, key_lengths=lengths, page_table=table)
    for b, length in enumerate(case.lengths):
        last = torch.arange(length)[-case.queries :] if case.causal else torch.full((case.queries,), length)
        expected = F.scaled_dot_product_attention(
            q[b : b + 1].transpose(1, 2),
            k[b : b + 1, :length].transpose(1, 2),
            v[b : b + 1, :length].transpose(1, 2),
            attn_mask=torch.arange(length) <= last[:, None],
            enable_gqa=True,
        )
        torch.testing.assert_close(actual[b], expected[0].transpose(0, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(backend: str, case: Case, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    q, k, v = case.tensors(dtype, device)
    lengths = torch.tensor(case.lengths, device=device)
    exact = exactly(attention, q, k, v, causal=case.causal, key_lengths=lengths)
    keys, values, table = k, v, None
    if case.page_size is not None:
        keys, values, table = paged(k, v, list(case.lengths), case.page_size)
    with poisoned(backend):
        actual = attention(q, keys, values, causal=case.causal, key_lengths=lengths, page_table=table)
    assert_accurate(actual, exact, plain(q, k, v, list(case.lengths), case.causal))


E4M3 = torch.float8_e4m3fn
CODES = (torch.int8, E4M3)


def quantized(x: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes with a scale for each token and head: (codes as float32, scales [..., 1]). The first token is zero."""
    x = x.float()
    x[:, 0] = 0
    scales = x.abs().amax(-1, keepdim=True) / (127 if codes == torch.int8 else 448)
    shares = (x / scales).nan_to_num(0)
    return shares.round() if codes == torch.int8 else shares.to(codes).float(), scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("case", [case for case in CASES if case.page_size], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_of_eight_bits(
    backend: str, case: Case, codes: torch.dtype, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    """Scales differ a thousandfold from token to token and head to head. With larger ones a near tie of two huge scores
    would decide about all of the error."""
    check_codes(backend, case, codes, dtype, device)


@pytest.mark.parametrize("case", [CASES[7], CASES[10]], ids=str)
@pytest.mark.parametrize("chip", ["sm80", "sm90"])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend == "triton"])
def test_codes_on_every_kind_of_chip(
    backend: str, codes: torch.dtype, chip: str, case: Case, seed: int, device: torch.device
) -> None:
    """sm_80 has no e4m3; sm_90 fetches tiles by itself, with NaN behind the last token."""
    with targeting(chip):
        check_codes(backend, case, codes, torch.bfloat16, device)


def check_codes(backend: str, case: Case, codes: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = case.tensors(dtype, device)
    k, v = (x * 10 ** torch.empty(*x.shape[:3], 1, device=device).uniform_(-3, 0).to(dtype) for x in (k, v))
    (k, k_scales), (v, v_scales) = quantized(k, codes), quantized(v, codes)
    lengths, page_size = list(case.lengths), case.page_size or 0
    k_pool, v_pool, table = paged(torch.cat((k, k_scales), -1), torch.cat((v, v_scales), -1), lengths, page_size)
    with poisoned(backend):
        actual = attention(
            q,
            *(
                (pool[..., :-1].nan_to_num(77) if codes == torch.int8 else pool[..., :-1]).to(codes).contiguous()
                for pool in (k_pool, v_pool)
            ),
            causal=case.causal,
            key_lengths=torch.tensor(lengths, device=device),
            page_table=table,
            k_scales=k_pool[..., -1].contiguous(),
            v_scales=v_pool[..., -1].contiguous(),
        )
    k, v = k.double() * k_scales, v.double() * v_scales
    exact = exactly(attention, q, k, v, causal=case.causal, key_lengths=torch.tensor(lengths, device=device))
    assert_accurate(actual, exact, plain(q, k.to(dtype), v.to(dtype), lengths, case.causal))


@pytest.mark.parametrize("case", [CASES[2], CASES[10]], ids=str)
@pytest.mark.parametrize("chip", ["sm80", "sm90"])
def test_tiles_are_the_same_through_pointers_and_descriptors(chip: str, case: Case, seed: int) -> None:
    """sm_90 fetches them by itself. What lies in a page behind the last token is NaN."""
    q, k, v = case.tensors(torch.bfloat16, torch.device("cpu"))
    lengths = torch.tensor(case.lengths)
    keys, values, table = k, v, None
    if case.page_size is not None:
        keys, values, table = paged(k, v, list(case.lengths), case.page_size)
        assert keys.isnan().any()
    fetched = []

    def tiles(x: Tensor, block: int) -> TensorDescriptor:
        fetched.append(x)
        return made(x, block)

    made = module._tiles
    with targeting(chip), poisoned("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_tiles", tiles)
        actual = attention(q, keys, values, causal=case.causal, key_lengths=lengths, page_table=table)
    assert bool(fetched) == (chip == "sm90")
    exact = exactly(attention, q, k, v, causal=case.causal, key_lengths=lengths)
    assert_accurate(actual, exact, plain(q, k, v, list(case.lengths), case.causal))


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_prefix_length(backend: str, page_size: int, seed: int, device: torch.device) -> None:
    """A chunk of queries behind a prefix equals the same rows of the whole sequence."""
    length = 290
    q, k, v = Case((length,), length, (4, 2), 16, causal=True).tensors(torch.float32, device)
    k_pool, v_pool, table = paged(k, v, [length], page_size)
    whole = exactly(attention, q, k, v, causal=True)
    for prefix in (0, 1, 7, 15, 16, 17, 31, 255, 256, 257, 289):
        end = min(prefix + 7, length)
        lengths = torch.tensor([end], device=device)
        with poisoned(backend):
            chunk = attention(q[:, prefix:end], k_pool, v_pool, causal=True, key_lengths=lengths, page_table=table)
        torch.testing.assert_close(chunk.double(), whole[:, prefix:end], rtol=0, atol=2e-6)


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_where_pages_lie_does_not_matter(backend: str, page_size: int, seed: int, device: torch.device) -> None:
    case = Case((300, 41), 5, (14, 2), 64, causal=True)
    q, k, v = case.tensors(torch.bfloat16, device)
    lengths = torch.tensor(case.lengths, device=device)
    outputs = []
    for consecutive in (False, True):
        k_pool, v_pool, table = paged(k, v, list(case.lengths), page_size, consecutive)
        with poisoned(backend):
            outputs.append(attention(q, k_pool, v_pool, causal=True, key_lengths=lengths, page_table=table))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_are_independent(backend: str, causal: bool, seed: int, device: torch.device) -> None:
    case = Case((9, 40, 23), 9, (6, 3), 32, causal)
    q, k, v = case.tensors(torch.float32, device)
    with poisoned(backend):
        together = attention(q, k, v, causal=causal, key_lengths=torch.tensor(case.lengths, device=device))
        for b, length in enumerate(case.lengths):
            alone = attention(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], causal=causal)
            torch.testing.assert_close(together[b], alone[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("unit", ["tokens", "seconds"])
@pytest.mark.parametrize("backend", ["reference", *WITH_ROTATION])
def test_rotation_inside_equals_rotation_outside(
    backend: str, unit: str, pairing: Pairing, seed: int, device: torch.device
) -> None:
    """RoPE (position = index) and the report's RoTE (position = -2 pi * seconds) are one operation."""
    case = Case((29, 29), 29, (4, 2), 32, causal=True)
    q, k, v = case.tensors(torch.float32, device)
    seconds = torch.rand(2, 29).cumsum(1) * 0.08
    positions = torch.arange(100, 129).float().expand(2, -1) if unit == "tokens" else -2 * math.pi * seconds
    rotation = Rotation(positions.to(device), rope_frequencies(32, 1200.0, device), pairing)
    with poisoned(backend):
        inside = attention(q, k, v, causal=True, rotation=rotation, key_rotation=rotation)
        outside = attention(rotary(q, rotation), rotary(k, rotation), v, causal=True)
        without = attention(q, k, v, causal=True)
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-6)
    assert not torch.allclose(inside, without, atol=1e-2)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("head_dim", [64, 24])
@pytest.mark.parametrize("pairs", [32, 12, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_of_queries_over_a_paged_cache(
    backend: str, pairs: int, head_dim: int, pairing: Pairing, seed: int, device: torch.device
) -> None:
    """Keys lie rotated in the cache; only the queries turn on the way in, all their channels or the first of them."""
    q, k, v = Case((40, 31), 6, (14, 2), head_dim, causal=True).tensors(torch.float32, device)
    frequencies = rope_frequencies(2 * min(pairs, head_dim // 2), 15.3e6, device)
    everywhere = Rotation(torch.arange(40.0, device=device).expand(2, -1), frequencies, pairing)
    last = Rotation(torch.stack([torch.arange(n - 6.0, n) for n in (40, 31)]).to(device), frequencies, pairing)
    lengths = torch.tensor([40, 31], device=device)
    options = {"causal": True, "key_lengths": lengths, "rotation": last}
    expected = exactly(attention, q, k, v, key_rotation=everywhere, **options)
    k_pool, v_pool, table = paged(rotary(k, everywhere), v, [40, 31], 16)
    with poisoned(backend):
        actual = attention(q, k_pool, v_pool, page_table=table, **options)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("backend", WITH_ROTATION)
def test_accuracy_with_rotation(
    backend: str, pairing: Pairing, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    q, k, v = Case((37,), 37, (3, 3), 64, causal=False).tensors(dtype, device)
    positions = -2 * math.pi * torch.rand(1, 37, device=device).cumsum(1)
    rotation = Rotation(positions, rope_frequencies(64, 1200.0, device), pairing)
    exact = exactly(attention, q, k, v, rotation=rotation, key_rotation=rotation)
    with poisoned(backend):
        actual = attention(q, k, v, rotation=rotation, key_rotation=rotation)
    turned = (rotary_module.reference(x, rotation) for x in (q, k))
    assert_accurate(actual, exact, plain(*turned, v, [37], False))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("backend", ["reference", *WITH_ROTATION])
def test_only_differences_of_positions_matter(backend: str, pairing: Pairing, seed: int, device: torch.device) -> None:
    q, k, v = Case((23,), 23, (2, 2), 64, causal=False).tensors(torch.float32, device)
    positions = -2 * math.pi * (torch.rand(1, 23, device=device) * 3)
    frequencies = rope_frequencies(64, 1200.0, device)
    here = Rotation(positions, frequencies, pairing)
    later = Rotation(positions + 77.7, frequencies, pairing)
    apart = Rotation(positions * 1.5, frequencies, pairing)
    with poisoned(backend):
        expected = attention(q, k, v, rotation=here, key_rotation=here)
        shifted = attention(q, k, v, rotation=later, key_rotation=later)
        stretched = attention(q, k, v, rotation=apart, key_rotation=apart)
    torch.testing.assert_close(shifted, expected, rtol=0, atol=2e-4)
    assert not torch.allclose(stretched, expected, atol=1e-2)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_extreme_scores(backend: str, page_size: int | None, seed: int, device: torch.device) -> None:
    """Scores in the ten thousands pick one value exactly, scores all alike average, whatever their size."""
    lengths = torch.tensor([33], device=device)
    _, _, v = Case((33,), 33, (1, 1), 64, causal=False).tensors(torch.float32, device)
    corners = torch.eye(64, device=device)[None, :33, None]
    outputs = []
    for q, k in ((800 * corners, 800 * corners), (-800 * corners[:, :1], 800 * corners[:, :1].expand_as(v))):
        keys, values, table = (k, v, None) if page_size is None else paged(k, v, [33], page_size)
        with poisoned(backend):
            outputs.append(attention(q, keys, values, key_lengths=lengths, page_table=table))
    assert torch.equal(outputs[0], v)
    torch.testing.assert_close(outputs[1], v.mean(1, keepdim=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_single_key_returns_its_value(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    q, k, v = Case((1, 1), 3, (4, 2), 32, causal=False).tensors(dtype, device)
    with poisoned(backend):
        out = attention(100 * q, k, v)
    assert torch.equal(out, v.repeat_interleave(2, dim=2).expand_as(out))


@pytest.mark.parametrize("scale", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_scale(backend: str, scale: float, seed: int, device: torch.device) -> None:
    q, k, v = Case((11,), 11, (2, 1), 16, causal=True).tensors(torch.float32, device)
    with poisoned(backend):
        actual = attention(q, k, v, causal=True, scale=scale)
    torch.testing.assert_close(actual, plain(q, k, v, [11], True, scale), rtol=0, atol=5e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str, causal: bool, seed: int, device: torch.device) -> None:
    """q, k and v as slices of one fused projection."""
    fused = torch.randn(2, 21, 8, 32).to(device)
    q, k, v = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    with poisoned(backend):
        actual = attention(q, k, v, causal=causal)
    torch.testing.assert_close(actual, plain(q, k, v, [21, 21], causal), rtol=0, atol=2e-6)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_beyond_two_to_the_31(
    backend: str, page_size: int | None, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third page, or the third sequence, begins 2^31 elements after the first; nothing between is touched."""
    k, v = far_apart(3, 16, device)
    keys, values, tokens = k.contiguous(), v.contiguous(), k.shape[1]
    q = torch.randn(3, 3, 2, 16).to(device, torch.float16)
    table = None if page_size is None else torch.tensor([[1], [0], [2]], dtype=torch.int32, device=device)
    order = [0, 1, 2] if page_size is None else [1, 0, 2]
    lengths = torch.full((3,), tokens, device=device)
    without_races(backend, device, monkeypatch)
    with poisoned(backend):
        actual = attention(q, k, v, causal=True, key_lengths=lengths, page_table=table)
    expected = exactly(attention, q, keys[order], values[order], causal=True)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4e-3)


# more rows than one thread takes at a time, several blocks of keys, and ends inside and on the edges of both
LONG = [
    Case((515,), 515, (2, 2), 64, causal=False),
    Case((700, 257), 400, (3, 1), 32, causal=False),
    Case((800,), 600, (2, 1), 64, causal=True),
    Case((512, 300), 160, (7, 1), 24, causal=True, page_size=48),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_long_sequences(backend: str, case: Case, dtype: torch.dtype, seed: int) -> None:
    test_accuracy(backend, case, dtype, seed, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", [*CASES[2::2], LONG[-1]], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_native_stays_within_its_memory(
    backend: str, case: Case, threads: int, dtype: torch.dtype, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same."""
    q, k, v = case.tensors(dtype, torch.device("cpu"))
    lengths, table = torch.tensor(case.lengths), None
    rotation = Rotation(torch.rand(q.shape[:2]), rope_frequencies(8, 100.0))
    if case.page_size is not None:
        k, v, table = paged(k, v, list(case.lengths), case.page_size)
    options = {"causal": case.causal, "key_lengths": lengths, "page_table": table, "rotation": rotation}
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = attention(q, k, v, **options)
    torch.set_num_threads(threads)
    options |= {"key_lengths": guarded(lengths), "page_table": None if table is None else guarded(table)}
    with poisoned(backend):
        actual = attention(guarded(q), guarded(k), guarded(v), **options)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", NATIVE)
def test_native_reads_no_page_that_is_not_there(backend: str) -> None:
    q, pool, table = torch.zeros(1, 3, 2, 8), torch.zeros(4, 16, 2, 8), torch.zeros(1, 2, dtype=torch.int32)
    with poisoned(backend), pytest.raises(ValueError, match="33 tokens, and room for 32"):
        attention(q, pool, pool, key_lengths=torch.tensor([33]), page_table=table)


Q, K, POOL = (2, 5, 4, 8), (2, 9, 2, 8), (6, 16, 2, 8)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        (Q, K, (2, 8, 2, 8)),
        (Q, (2, 9, 3, 8), (2, 9, 3, 8)),
        (Q, (2, 9, 2, 16), (2, 9, 2, 16)),
        (Q, (3, 9, 2, 8), (3, 9, 2, 8)),
        ((5, 4, 8), K, K),
        (Q, (9, 2, 8), (9, 2, 8)),
    ],
)
def test_wrong_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="attention takes") as error:
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))
    assert all(str(shape) in str(error.value) for shape in (q, k, v))


def test_wrong_lengths_and_tables() -> None:
    q, k, pool = torch.zeros(Q), torch.zeros(K), torch.zeros(POOL)
    lengths, table = torch.tensor([9, 9]), torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        attention(q, k, k, key_lengths=torch.tensor([9, 9, 9]))
    with pytest.raises(ValueError, match="key_lengths"):
        attention(q, pool, pool, page_table=table)
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        attention(q, pool, pool, page_table=torch.zeros(3, 1, dtype=torch.int32), key_lengths=lengths)
    with pytest.raises(ValueError, match=r"5 queries.*4 keys"):
        attention(q, k[:, :4], k[:, :4], causal=True)
    rotation = Rotation(torch.zeros(2, 5), torch.ones(4))
    with pytest.raises(ValueError, match="rotated when they are written"):
        attention(q, pool, pool, page_table=table, key_lengths=lengths, key_rotation=rotation)
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 9, 2, 8\)"):
        attention(q, k, k, key_rotation=rotation)


def test_wrong_dtypes_and_scales() -> None:
    q, k, pool = torch.zeros(Q), torch.zeros(K), torch.zeros(POOL, dtype=torch.int8)
    scales = torch.zeros(POOL[:3])
    cache = {"page_table": torch.zeros(2, 1, dtype=torch.int32), "key_lengths": torch.tensor([9, 9])}
    attention(q, pool, pool, k_scales=scales, v_scales=scales, **cache)
    with pytest.raises(ValueError, match=r"float32 like q.*float16"):
        attention(q, k.half(), k.half())
    with pytest.raises(ValueError, match=r"fp8 with scales; got torch\.int8"):
        attention(q, pool, pool, **cache)
    with pytest.raises(ValueError, match=r"fp8 with scales; got torch\.int8"):
        attention(q, pool, pool, k_scales=scales, **cache)
    with pytest.raises(ValueError, match=r"fp8 with scales; got torch\.float32"):
        attention(q, pool.float(), pool.float(), k_scales=scales, v_scales=scales, **cache)
    with pytest.raises(ValueError, match="no page_table"):
        attention(q, k.to(torch.int8), k.to(torch.int8), k_scales=scales, v_scales=scales)
    for wrong in (scales[1:], scales.half(), scales.transpose(0, 1).contiguous().transpose(0, 1)):
        with pytest.raises(ValueError, match="contiguous float32"):
            attention(q, pool, pool, k_scales=wrong, v_scales=scales, **cache)
