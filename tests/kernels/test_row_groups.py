"""Inside `row_invariant`, a row's result has the bits that it has alone, whatever and how many rows are beside it."""

from collections.abc import Callable

import pytest
import torch
from support.accuracy import DTYPES, backends, paged, poisoned
from torch import Tensor

from afnext.kernels import linear as dense
from afnext.kernels import linear_int4
from afnext.kernels.activation import swiglu
from afnext.kernels.decode_attention import FIXED_SHARE, decode_attention
from afnext.kernels.few_rows import to_tiles
from afnext.kernels.kv_write import kv_write
from afnext.kernels.norm import add_rms_norm, rms_norm
from afnext.kernels.rotary import Rotation, rope_frequencies
from afnext.kernels.row_groups import row_invariant
from afnext.kernels.sampling import SamplingRows, sample
from afnext.quant.linear import Linear
from afnext.quant.scheme import parse_scheme

ROWS = (2, 3, 4, 5, 8, 9, 16, 33)
FEW_ROWS = (2, 9)  # for the interpreter, which is slow
SCHEMES = (
    "dense",
    "int8",
    "int8-w8a8",
    "fp8",
    "int8-g32",
    "int4-g64",
    "int4-g32-zeros",
    "int4-g64-w4a8",
    "int3-g64",
    "nf4",
    "nvfp4",
    "mxfp4",
)
ALL = backends(dense._operation, linear_int4.INT4.single)


def layer(scheme: str, inner: int, columns: int, dtype: torch.dtype, device: torch.device, bias: bool) -> Linear:
    made = Linear(inner, columns, bias=bias)
    weight, kind = torch.randn(columns, inner) / inner**0.5, parse_scheme(scheme)
    if kind is None:
        made.weight = weight.to(device, dtype)
    else:
        made.use(kind)
        for name, part in kind.quantize(weight).named().items():
            setattr(made, name, part.to(device))
        made.prepare(dtype)
    if bias:
        made.bias = torch.randn(columns).to(device, dtype)
    return made


def assert_rows_are_alone(function: Callable[..., Tensor], *rows: Tensor, counts: tuple[int, ...] = ROWS) -> None:
    """Fail unless function(*rows) of `counts` rows is, bit by bit, what it is of each row alone: of the first two and
    the last of each count, or of all rows of all counts by default."""
    compared = set(range(max(counts))) if counts is ROWS else {0, 1, *(count - 1 for count in counts)}
    with row_invariant():
        alone = {i: function(*(x[i : i + 1].clone() for x in rows))[0] for i in compared}
        for count in counts:
            together = function(*(x[:count].clone() for x in rows))
            different = [i for i in compared if i < count and not torch.equal(together[i], alone[i])]
            assert not different, f"rows {different} of {count}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", ALL)
def test_products(backend: str, scheme: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    interpreted = backend == "triton"
    if interpreted and dtype != torch.bfloat16:
        pytest.skip("the interpreter is slow, and all dtypes are launched alike")
    if scheme in ("fp8", "nvfp4", "mxfp4") and backend.startswith("native"):
        pytest.skip("no native kernels")
    # Divided among programs for few rows; a step takes no more than a group.
    inner, columns = (256 if "g32" in scheme else 512, 40) if interpreted else (384 if "int3" in scheme else 320, 77)
    product = layer(scheme, inner, columns, dtype, device, bias=True)
    gate, up = (layer(scheme, inner, columns, dtype, device, bias=False) for _ in range(2))
    counts = (17, 66) if interpreted else ROWS  # 66: more than are divided otherwise
    x, residual = torch.randn(66, inner).to(device, dtype), torch.randn(66, columns).to(device, dtype)
    with poisoned(backend):
        assert_rows_are_alone(lambda x, r: product(x, residual=r), x, residual, counts=counts)
        assert_rows_are_alone(lambda x: gate(x, up=up), x, counts=counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_decode_attention(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    """One new token a sequence, beside shorter and longer ones, in page tables of other widths."""
    if backend == "triton" and dtype != torch.bfloat16:
        pytest.skip("the interpreter is slow, and all dtypes are launched alike")
    lengths = [FIXED_SHARE + 89, 1, 300, 2 * FIXED_SHARE, 130]
    k, v = torch.randn(2, len(lengths), max(lengths), 2, 32).to(device, dtype)
    keys, values, table = paged(k, v, lengths, 64)
    q = torch.randn(len(lengths), 1, 6, 32).to(device, dtype)

    def attend(which: list[int]) -> Tensor:
        width = max(-(-lengths[b] // 64) for b in which)
        return decode_attention(
            q[which],
            keys,
            values,
            key_lengths=torch.tensor([lengths[b] for b in which], device=device),
            page_table=table[which, :width].contiguous(),
        )

    with poisoned(backend), row_invariant():
        alone = torch.cat([attend([b]) for b in range(len(lengths))])
        for which in ([0, 1], [2, 3, 4], list(range(len(lengths)))):
            assert torch.equal(attend(which), alone[which])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 257])
@pytest.mark.parametrize("backend", ALL)
def test_norms_and_swiglu(backend: str, width: int, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    x, y, weight = (torch.randn(n, width).to(device, dtype) for n in (33, 33, 1))
    with poisoned(backend):
        counts = FEW_ROWS if backend == "triton" else ROWS
        assert_rows_are_alone(lambda x: rms_norm(x, weight[0]), x, counts=counts)
        assert_rows_are_alone(lambda x, y: torch.stack(add_rms_norm(x, y, weight[0]), 1), x, y, counts=counts)
        assert_rows_are_alone(swiglu, x, y, counts=counts)


@pytest.mark.parametrize("head_dim", [16, 90])
@pytest.mark.parametrize("backend", ALL)
def test_rotated_queries_and_keys(backend: str, head_dim: int, seed: int, device: torch.device) -> None:
    """In bfloat16, with cosines and sines of positions of up to 60 000."""
    q, k, v = (torch.randn(33, 1, heads, head_dim).to(device, torch.bfloat16) for heads in (6, 2, 2))
    positions = torch.randint(0, 60_000, (33, 1)).to(device)
    frequencies = rope_frequencies(head_dim, 1e6, device)

    def write(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        caches = torch.zeros(2, len(q), 1, 2, head_dim, dtype=q.dtype, device=device)
        turned = kv_write(
            q,
            k,
            v,
            k_cache=caches[0],
            v_cache=caches[1],
            slots=torch.arange(len(q), device=device)[:, None],
            rotation=Rotation(positions.float(), frequencies),
        )
        return torch.cat((turned.flatten(1), caches[0].flatten(1), caches[1].flatten(1)), 1)

    with poisoned(backend):
        assert_rows_are_alone(write, q, k, v, positions, counts=FEW_ROWS if backend == "triton" else ROWS)


@pytest.mark.parametrize("backend", ALL)
def test_sampling(backend: str, seed: int, device: torch.device) -> None:
    logits = 4 * torch.randn(9, 700, device=device)
    filters = [torch.rand(9), torch.randint(0, 60, (9,)), torch.rand(9), torch.rand(9) / 10, torch.rand(9)]
    filters[0] += 0.1
    filters[2].clamp_(min=0.1)

    def draw(logits: Tensor, temperature: Tensor, k: Tensor, p: Tensor, least: Tensor, uniform: Tensor) -> Tensor:
        return sample(logits, SamplingRows(temperature, k, p, least), uniform)

    with poisoned(backend):
        assert_rows_are_alone(
            draw, logits, *(x.to(device) for x in filters), counts=(2, 3) if backend == "triton" else (2, 3, 9)
        )


def test_outside_a_row_depends_on_its_company(seed: int) -> None:
    """Of float32, one row, two, four and many are summed in other orders: so the other tests can fail."""
    x, product = torch.randn(33, 320), layer("dense", 320, 77, torch.float32, torch.device("cpu"), bias=False)
    alone = product(x[:1])
    assert any(not torch.equal(product(x[:count])[:1], alone) for count in ROWS)


def test_rows_are_padded_to_tiles_of_three_and_four() -> None:
    assert [to_tiles(rows) for rows in range(9)] == [0, 3, 3, 3, 4, 7, 7, 7, 8]


def test_rows_of_no_tokens_are_none(seed: int) -> None:
    for scheme in SCHEMES:
        product = layer(scheme, 128, 40, torch.float32, torch.device("cpu"), bias=True)
        with row_invariant():
            assert product(torch.empty(0, 128)).shape == (0, 40)
            assert product(torch.randn(2, 3, 128)).shape == (2, 3, 40)
