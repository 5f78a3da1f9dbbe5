"""int8 linear layers: every backend against the float64 reference, and the error against a plain dense product."""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, native_backends, poisoned
from support.int8_products import dense, product, weights
from torch.nn import functional as F

from afnext.bench.ops.guarded import guarded
from afnext.kernels import linear_int8 as module
from afnext.kernels.linear_int8 import linear_int8, linear_int8_swiglu
from afnext.kernels.packed_product import FEW_CPU_ROWS
from afnext.kernels.packed_weight import Packed

SHAPES = [(1, 256, 96), (3, 144, 37), (201, 16, 1), (33, 272, 70), (64, 512, 64), (70, 144, 131)]  # rows, in, out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(module.INT8.single))
def test_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = torch.randn(rows, inner).to(device, dtype)
    weight = weights(columns, inner, device)
    with poisoned(backend):
        actual = linear_int8(x, weight)
    assert_accurate(actual, exactly(linear_int8, x, weight), product(x, dense(weight, dtype)))


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize(("with_bias", "with_residual"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("backend", backends(module.INT8.single))
def test_bias_and_residual(
    backend: str, with_bias: bool, with_residual: bool, rows: int, seed: int, device: torch.device
) -> None:
    x = torch.randn(1, rows, 384).to(device, torch.bfloat16)
    weight = weights(43, 384, device)
    bias = torch.randn(43).to(device, x.dtype) if with_bias else None
    residual = torch.randn(1, rows, 43).to(device, x.dtype) if with_residual else None
    with poisoned(backend):
        actual = linear_int8(x, weight, bias, residual)
    plain = F.linear(x, dense(weight, x.dtype), bias)
    plain = plain if residual is None else plain + residual
    assert_accurate(actual, exactly(linear_int8, x, weight, bias, residual), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 512, 48), (9, 144, 37), (66, 80, 129)])
@pytest.mark.parametrize("backend", backends(module.INT8.pair))
def test_swiglu_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = (3 * torch.randn(rows, inner)).to(device, dtype)
    gate, up = weights(columns, inner, device), weights(columns, inner, device)
    with poisoned(backend):
        actual = linear_int8_swiglu(x, gate, up)
    plain = F.silu(product(x, dense(gate, dtype))) * product(x, dense(up, dtype))
    assert_accurate(actual, exactly(linear_int8_swiglu, x, gate, up), plain)


def test_reference_is_the_dense_product(seed: int) -> None:
    x, codes = torch.randn(3, 32, dtype=torch.float64), torch.randint(-127, 128, (5, 32), dtype=torch.int8)
    scales = torch.rand(5, dtype=torch.float64)
    expected = torch.einsum("mk,nk,n->mn", x, codes.double(), scales)
    torch.testing.assert_close(exactly(linear_int8, x, Packed(codes, scales)), expected)


@pytest.mark.parametrize("backend", backends(module.INT8.single, module.INT8.pair))
def test_strided_and_empty_inputs(backend: str, seed: int, device: torch.device) -> None:
    weight = weights(20, 32, device)
    wide = torch.randn(5, 2, 64).to(device)
    x, residual = wide[..., :32], torch.randn(20, 2, 5).to(device).permute(2, 1, 0)
    empty = torch.empty(0, 32, device=device)
    with poisoned(backend):
        expected = linear_int8(x.contiguous(), weight, None, residual.contiguous())
        assert torch.equal(linear_int8(x, weight, None, residual), expected)
        assert linear_int8(empty, weight).shape == (0, 20)
        assert linear_int8_swiglu(empty, weight, weight).shape == (0, 20)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 19, 50])
@pytest.mark.parametrize("backend", native_backends(module.INT8.single, module.INT8.pair))
def test_native_stays_within_its_memory(
    backend: str, rows: int, threads: int, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same.

    Many rows may be added up by torch, whose order depends on the threads.
    """
    tolerance = {"rtol": 0, "atol": 0 if rows <= FEW_CPU_ROWS else 0.05}
    x, (codes, scales, _), bias = torch.randn(rows, 1040), weights(53, 1040, torch.device("cpu")), torch.randn(53)
    x, residual = x.bfloat16(), torch.randn(rows, 53).bfloat16()
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = [
            linear_int8(x, Packed(codes, scales), bias, residual),
            linear_int8_swiglu(x, Packed(codes, scales), Packed(codes, scales)),
        ]
    torch.set_num_threads(threads)
    x, codes, scales, bias, residual = map(guarded, (x, codes, scales, bias, residual))
    with poisoned(backend):
        torch.testing.assert_close(linear_int8(x, Packed(codes, scales), bias, residual), expected[0], **tolerance)
        torch.testing.assert_close(
            linear_int8_swiglu(x, Packed(codes, scales), Packed(codes, scales)), expected[1], **tolerance
        )


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("backend", native_backends(module.INT8.single))
def test_the_largest_sums(backend: str, rows: int) -> None:
    """All codes and all activations as large as they can be: sums of integers do not overflow."""
    x, scales = torch.full((rows, 2064), 3.0).bfloat16(), torch.full((40,), 2.0**-12)
    x[1] = -3
    codes = torch.full((40, 2064), -128, dtype=torch.int8)
    codes[1::2] = 127
    with poisoned(backend):
        actual = linear_int8(x, Packed(codes, scales))
    torch.testing.assert_close(actual.double(), exactly(linear_int8, x, Packed(codes, scales)), rtol=0.01, atol=0)


@pytest.mark.parametrize("backend", native_backends(module.INT8.single))
def test_tokens_and_outputs_for_several_rounds(backend: str, seed: int) -> None:
    """More tokens, outputs and inputs than any cache is given at a time."""
    x, weight = torch.randn(1100, 1296).bfloat16(), weights(333, 1296, torch.device("cpu"))
    with poisoned(backend):
        y = linear_int8(x, weight)
    torch.testing.assert_close(y.double(), x.double() @ dense(weight, torch.float64).T, rtol=2**-7, atol=5e-3)


@pytest.mark.parametrize("backend", backends(module.INT8.single))
def test_the_same_twice(backend: str, seed: int, device: torch.device) -> None:
    x = torch.randn(2, 1024).to(device, torch.bfloat16)
    weight = weights(33, 1024, device)
    with poisoned(backend):
        assert torch.equal(linear_int8(x, weight), linear_int8(x, weight))


def test_refusals() -> None:
    x, codes, scales = torch.zeros(2, 32), torch.zeros(5, 32, dtype=torch.int8), torch.zeros(5)
    cases = [
        (lambda: linear_int8(x[:, :16], Packed(codes, scales)), r"\(2, 16\)"),
        (lambda: linear_int8(x.int(), Packed(codes, scales)), "int32"),
        (lambda: linear_int8(x, Packed(codes.float(), scales)), "int8"),
        (lambda: linear_int8(x[:, :8], Packed(codes[:, :8].contiguous(), scales)), "multiple of 16"),
        (lambda: linear_int8(x, Packed(codes, scales[:4])), "scales"),
        (lambda: linear_int8(x, Packed(codes, scales), bias=torch.zeros(4)), "bias"),
        (lambda: linear_int8(x, Packed(codes, scales), residual=torch.zeros(2, 4)), "residual"),
        (lambda: linear_int8_swiglu(x, Packed(codes, scales), Packed(codes[:4], scales[:4])), "one shape"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
