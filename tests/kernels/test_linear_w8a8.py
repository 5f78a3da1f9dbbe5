"""W8A8 linear layers: every backend against the float64 reference, and what rounding the activations costs.

Triton's kernels are W8A16's for few rows, so they are held to that reference there.
"""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, native_backends, poisoned
from support.int8_products import dense, product, rounds_inputs, spare_the_interpreter, weights
from torch import Tensor
from torch.nn import functional as F

from afnext.bench.ops.guarded import guarded
from afnext.kernels import linear_w8a8 as module
from afnext.kernels import quantize_rows as rows_module
from afnext.kernels.linear_int8 import linear_int8, linear_int8_swiglu
from afnext.kernels.linear_w8a8 import linear_w8a8, linear_w8a8_swiglu
from afnext.kernels.packed_weight import Packed


def rounded(x: Tensor) -> Tensor:
    return dense(Packed(*rows_module.reference(x)), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 3), (7, 144, 37), (131, 144, 40)])
@pytest.mark.parametrize("backend", backends(module.W8A8.single))
def test_accuracy(
    backend: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, inner, columns = shape
    x = torch.randn(rows, inner).to(device, dtype)
    weight = weights(columns, inner, device)
    bias, residual = torch.randn(columns).to(device, dtype), torch.randn(rows, columns).to(device, dtype)
    spare_the_interpreter(backend, rows, module, monkeypatch)
    with poisoned(backend):
        actual = linear_w8a8(x, weight, bias, residual)
    rounds = rounds_inputs(backend, rows)
    plain = product(rounded(x) if rounds else x, dense(weight, dtype)) + bias + residual
    assert_accurate(actual, exactly(linear_w8a8 if rounds else linear_int8, x, weight, bias, residual), plain)


def test_is_close_to_the_product_of_unrounded_activations(seed: int) -> None:
    x = torch.randn(40, 512)
    weight = weights(60, 512, x.device)
    exact = exactly(linear_int8, x, weight)
    error = exactly(linear_w8a8, x, weight) - exact
    assert 0 < error.square().mean() / exact.square().mean() < 0.01**2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 512, 48), (9, 144, 37), (66, 80, 129), (1050, 48, 32)])
@pytest.mark.parametrize("backend", backends(module.W8A8.pair))
def test_swiglu_accuracy(
    backend: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, inner, columns = shape
    x = (3 * torch.randn(rows, inner)).to(device, dtype)
    gate, up = weights(columns, inner, device), weights(columns, inner, device)
    spare_the_interpreter(backend, rows, module, monkeypatch)
    with poisoned(backend):
        actual = linear_w8a8_swiglu(x, gate, up)
    rounds = rounds_inputs(backend, rows)
    tokens = rounded(x) if rounds else x
    plain = F.silu(product(tokens, dense(gate, dtype))) * product(tokens, dense(up, dtype))
    assert_accurate(actual, exactly(linear_w8a8_swiglu if rounds else linear_int8_swiglu, x, gate, up), plain)


@pytest.mark.parametrize("rows", [1, 6, 40, 70])
@pytest.mark.parametrize("backend", backends(module.W8A8.single))
def test_of_the_largest_codes(backend: str, rows: int, seed: int, device: torch.device) -> None:
    """Sums of products of -128 and +-127, which overflow 16 bits when two are added, are exact."""
    codes = torch.full((40, 256), -128, dtype=torch.int8)
    codes[1:, ::2] = 127
    x = torch.full((rows, 256), 127.0)
    x[:, 1::3] = -127
    ones = torch.ones(40)
    with poisoned(backend):
        actual = linear_w8a8(x.to(device), Packed(codes.to(device), ones.to(device)))
    assert torch.equal(actual.double().cpu(), x.double() @ codes.double().T)


@pytest.mark.parametrize("backend", backends(module.W8A8.single, module.W8A8.pair))
def test_strided_and_empty_inputs(backend: str, seed: int, device: torch.device) -> None:
    weight = weights(20, 32, device)
    wide = torch.randn(5, 2, 64).to(device)
    x, residual = wide[..., :32], torch.randn(20, 2, 5).to(device).permute(2, 1, 0)
    empty = torch.empty(0, 32, device=device)
    with poisoned(backend):
        expected = linear_w8a8(x.contiguous(), weight, None, residual.contiguous())
        assert torch.equal(linear_w8a8(x, weight, None, residual), expected)
        assert linear_w8a8(empty, weight).shape == (0, 20)
        pair = linear_w8a8_swiglu(x, weight, weight)
        assert torch.equal(pair, linear_w8a8_swiglu(x.contiguous(), weight, weight))
        assert linear_w8a8_swiglu(empty, weight, weight).shape == (0, 20)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 19, 50])
@pytest.mark.parametrize("backend", native_backends(module.W8A8.single, module.W8A8.pair))
def test_native_stays_within_its_memory(
    backend: str, rows: int, threads: int, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same."""
    x, (codes, scales, _), bias = torch.randn(rows, 1040), weights(53, 1040, torch.device("cpu")), torch.randn(53)
    x, residual = x.bfloat16(), torch.randn(rows, 53).bfloat16()
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = linear_w8a8(x, Packed(codes, scales), bias, residual)
        pair = linear_w8a8_swiglu(x, Packed(codes, scales), Packed(codes, scales))
    torch.set_num_threads(threads)
    x, codes, scales, bias, residual = map(guarded, (x, codes, scales, bias, residual))
    with poisoned(backend):
        assert torch.equal(linear_w8a8(x, Packed(codes, scales), bias, residual), expected)
        assert torch.equal(linear_w8a8_swiglu(x, Packed(codes, scales), Packed(codes, scales)), pair)


@pytest.mark.parametrize("backend", native_backends(module.W8A8.single, module.W8A8.pair))
def test_tokens_and_outputs_for_several_rounds(backend: str, seed: int) -> None:
    """More tokens, outputs and inputs than any cache is given at a time."""
    x = torch.randn(1100, 1296).bfloat16()
    gate, up = weights(333, 1296, torch.device("cpu")), weights(333, 1296, torch.device("cpu"))
    rows, row_scales = rows_module.reference(x)
    gated, raised = (
        (rows.double() @ w.double().T) * row_scales.double()[:, None] * s.double() for w, s, _ in (gate, up)
    )
    with poisoned(backend):
        torch.testing.assert_close(linear_w8a8(x, gate).double(), gated, rtol=2**-8, atol=1e-6)
        pair = linear_w8a8_swiglu(x, gate, up)
    torch.testing.assert_close(pair.double(), F.silu(gated) * raised, rtol=2**-6, atol=1e-6)


def test_refusals() -> None:
    x, codes, scales = torch.zeros(2, 32), torch.zeros(5, 32, dtype=torch.int8), torch.zeros(5)
    cases = [
        (lambda: linear_w8a8(x[:, :16], Packed(codes, scales)), r"\(2, 16\)"),
        (lambda: linear_w8a8(x, Packed(codes, scales), residual=torch.zeros(2, 5).half()), "residual"),
        (lambda: linear_w8a8_swiglu(x, Packed(codes, scales), Packed(codes[:4], scales[:4])), "one shape"),
        (lambda: linear_w8a8_swiglu(x, Packed(codes, scales), Packed(codes.float(), scales)), "int8"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
