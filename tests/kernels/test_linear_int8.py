"""int8 linear layers: every backend against the float64 reference, and the error against a plain dense product."""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, native_backends, poisoned
from support.guarded import guarded
from torch import Tensor
from torch.nn import functional as F

from afnext.kernels import linear_int8 as module
from afnext.kernels import quantize_rows as rows_module
from afnext.kernels.linear_int8 import linear_int8, linear_int8_swiglu, linear_w8a8
from afnext.kernels.quantize_rows import quantize_rows

SHAPES = [(1, 256, 96), (3, 144, 37), (201, 16, 1), (33, 272, 70), (64, 512, 64), (70, 144, 131)]  # rows, in, out


def weights(columns: int, inner: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-127, 128, (columns, inner), dtype=torch.int8)
    return codes.to(device), (torch.rand(columns) / 127 / inner**0.5).to(device)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, one product added after the other in float32: libraries sum in an order that GPUs do not."""
    y = torch.zeros(len(x), len(weight), device=x.device)
    for k in range(x.shape[1]):
        y += x[:, k, None].float() * weight[:, k].float()
    return y.to(x.dtype)


def dense(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scales[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(module._linear))
def test_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = torch.randn(rows, inner).to(device, dtype)
    codes, scales = weights(columns, inner, device)
    with poisoned(backend):
        actual = linear_int8(x, codes, scales)
    assert_accurate(actual, exactly(linear_int8, x, codes, scales), product(x, dense(codes, scales, dtype)))


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize(("with_bias", "with_residual"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("backend", backends(module._linear))
def test_bias_and_residual(
    backend: str, with_bias: bool, with_residual: bool, rows: int, seed: int, device: torch.device
) -> None:
    x = torch.randn(1, rows, 384).to(device, torch.bfloat16)
    codes, scales = weights(43, 384, device)
    bias = torch.randn(43).to(device, x.dtype) if with_bias else None
    residual = torch.randn(1, rows, 43).to(device, x.dtype) if with_residual else None
    with poisoned(backend):
        actual = linear_int8(x, codes, scales, bias, residual)
    plain = F.linear(x, dense(codes, scales, x.dtype), bias)
    plain = plain if residual is None else plain + residual
    assert_accurate(actual, exactly(linear_int8, x, codes, scales, bias, residual), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 512, 48), (9, 144, 37), (66, 80, 129)])
@pytest.mark.parametrize("backend", backends(module._swiglu))
def test_swiglu_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = (3 * torch.randn(rows, inner)).to(device, dtype)
    gate, up = weights(columns, inner, device), weights(columns, inner, device)
    with poisoned(backend):
        actual = linear_int8_swiglu(x, *gate, *up)
    plain = F.silu(product(x, dense(*gate, dtype))) * product(x, dense(*up, dtype))
    assert_accurate(actual, exactly(linear_int8_swiglu, x, *gate, *up), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 3), (7, 144, 37), (131, 144, 40)])
@pytest.mark.parametrize("backend", backends(module._w8a8))
def test_w8a8_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = torch.randn(rows, inner).to(device, dtype)
    codes, scales = weights(columns, inner, device)
    bias, residual = torch.randn(columns).to(device, dtype), torch.randn(rows, columns).to(device, dtype)
    with poisoned(backend):
        actual = linear_w8a8(x, codes, scales, bias, residual)
    quantized, row_scales = rows_module.reference(x)
    plain = product(dense(quantized, row_scales, dtype), dense(codes, scales, dtype)) + bias + residual
    assert_accurate(actual, exactly(linear_w8a8, x, codes, scales, bias, residual), plain)


def test_w8a8_is_close_to_the_product_of_unrounded_activations(seed: int) -> None:
    x = torch.randn(40, 512)
    codes, scales = weights(60, 512, x.device)
    exact = exactly(linear_int8, x, codes, scales)
    error = exactly(linear_w8a8, x, codes, scales) - exact
    assert 0 < error.square().mean() / exact.square().mean() < 0.01**2


def test_reference_is_the_dense_product(seed: int) -> None:
    x, codes = torch.randn(3, 32, dtype=torch.float64), torch.randint(-127, 128, (5, 32), dtype=torch.int8)
    scales = torch.rand(5, dtype=torch.float64)
    expected = torch.einsum("mk,nk,n->mn", x, codes.double(), scales)
    torch.testing.assert_close(exactly(linear_int8, x, codes, scales), expected)


@pytest.mark.parametrize("backend", backends(rows_module._operation))
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_rows_are_those_of_the_reference(
    backend: str, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    x = (torch.randn(11, 1, 301) * 10.0 ** torch.randint(-3, 4, (11, 1, 1))).to(device, dtype)
    x[3] = 0
    x[4] = torch.arange(301) % 5 - 2.0  # scale 2 / 127, ties at none
    x[5, 0] = torch.arange(301) % 8 * 0.5  # after scaling to 127 = 3.5 * 36.3
    x[6, 0] = torch.cat([torch.tensor([127.0]), torch.arange(300) % 100 + 0.5])  # scale 1: ties everywhere
    with poisoned(backend):
        codes, scales = quantize_rows(x)
    expected_codes, expected_scales = rows_module.reference(x)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0)
    assert torch.equal(codes, expected_codes)
    assert codes[3].count_nonzero() == 0
    assert int(codes[6, 0, 1]) == 0
    assert int(codes[6, 0, 2]) == 2


@pytest.mark.parametrize("backend", backends(module._linear, module._swiglu, module._w8a8))
def test_strided_and_empty_inputs(backend: str, seed: int, device: torch.device) -> None:
    codes, scales = weights(20, 32, device)
    wide = torch.randn(5, 2, 64).to(device)
    x, residual = wide[..., :32], torch.randn(20, 2, 5).to(device).permute(2, 1, 0)
    empty = torch.empty(0, 32, device=device)
    with poisoned(backend):
        for function in (linear_int8, linear_w8a8):
            expected = function(x.contiguous(), codes, scales, None, residual.contiguous())
            assert torch.equal(function(x, codes, scales, None, residual), expected)
            assert function(empty, codes, scales).shape == (0, 20)
        assert linear_int8_swiglu(empty, codes, scales, codes, scales).shape == (0, 20)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 19, 50])
@pytest.mark.parametrize("backend", native_backends(module._linear, module._swiglu, module._w8a8))
def test_native_stays_within_its_memory(
    backend: str, rows: int, threads: int, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same.

    Many rows may be added up by torch, whose order depends on the threads.
    """
    tolerance = {"rtol": 0, "atol": 0 if rows <= module.FEW_CPU_ROWS else 0.05}
    x, (codes, scales), bias = torch.randn(rows, 1040), weights(53, 1040, torch.device("cpu")), torch.randn(53)
    x, residual = x.bfloat16(), torch.randn(rows, 53).bfloat16()
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = [
            linear_int8(x, codes, scales, bias, residual),
            linear_w8a8(x, codes, scales, bias, residual),
            linear_int8_swiglu(x, codes, scales, codes, scales),
        ]
    torch.set_num_threads(threads)
    x, codes, scales, bias, residual = map(guarded, (x, codes, scales, bias, residual))
    with poisoned(backend):
        torch.testing.assert_close(linear_int8(x, codes, scales, bias, residual), expected[0], **tolerance)
        torch.testing.assert_close(linear_w8a8(x, codes, scales, bias, residual), expected[1], **tolerance)
        torch.testing.assert_close(linear_int8_swiglu(x, codes, scales, codes, scales), expected[2], **tolerance)


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("backend", backends(module._w8a8))
def test_w8a8_of_the_largest_codes(backend: str, rows: int, seed: int, device: torch.device) -> None:
    """Sums of products of -128 and +-127, which overflow 16 bits when two are added, are exact."""
    codes = torch.full((40, 256), -128, dtype=torch.int8)
    codes[1:, ::2] = 127
    x = torch.full((rows, 256), 127.0)
    x[:, 1::3] = -127
    ones = torch.ones(40)
    with poisoned(backend):
        actual = linear_w8a8(x.to(device), codes.to(device), ones.to(device))
    assert torch.equal(actual.double().cpu(), x.double() @ codes.double().T)


@pytest.mark.parametrize("backend", native_backends(module._w8a8, module._linear))
def test_tokens_and_outputs_for_several_rounds(backend: str, seed: int) -> None:
    """More tokens, outputs and inputs than any cache is given at a time."""
    x, (codes, scales) = torch.randn(1100, 1296).bfloat16(), weights(333, 1296, torch.device("cpu"))
    rows, row_scales = rows_module.reference(x)
    exact = (rows.double() @ codes.double().T) * row_scales.double()[:, None] * scales.double()
    with poisoned(backend):
        torch.testing.assert_close(linear_w8a8(x, codes, scales).double(), exact, rtol=2**-8, atol=1e-6)
        y = linear_int8(x, codes, scales)
    torch.testing.assert_close(y.double(), x.double() @ dense(codes, scales, torch.float64).T, rtol=2**-7, atol=5e-3)


@pytest.mark.parametrize("backend", backends(module._linear))
def test_the_same_twice(backend: str, seed: int, device: torch.device) -> None:
    x = torch.randn(2, 1024).to(device, torch.bfloat16)
    codes, scales = weights(33, 1024, device)
    with poisoned(backend):
        assert torch.equal(linear_int8(x, codes, scales), linear_int8(x, codes, scales))


def test_refusals() -> None:
    x, codes, scales = torch.zeros(2, 32), torch.zeros(5, 32, dtype=torch.int8), torch.zeros(5)
    cases = [
        (lambda: linear_int8(x[:, :16], codes, scales), r"\(2, 16\)"),
        (lambda: linear_int8(x.int(), codes, scales), "int32"),
        (lambda: linear_int8(x, codes.float(), scales), "int8"),
        (lambda: linear_int8(x[:, :8], codes[:, :8].contiguous(), scales), "multiple of 16"),
        (lambda: linear_int8(x, codes, scales[:4]), "scales"),
        (lambda: linear_int8(x, codes, scales, bias=torch.zeros(4)), "bias"),
        (lambda: linear_int8(x, codes, scales, residual=torch.zeros(2, 4)), "residual"),
        (lambda: linear_w8a8(x, codes, scales, residual=torch.zeros(2, 5).half()), "residual"),
        (lambda: linear_int8_swiglu(x, codes, scales, codes[:4], scales[:4]), "one shape"),
        (lambda: quantize_rows(x.int()), "int32"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
