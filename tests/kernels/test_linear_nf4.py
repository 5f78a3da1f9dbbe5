"""nf4 linear layers: every backend against the float64 reference, and the error against a plain dense product."""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, native_backends, poisoned
from torch import Tensor
from torch.nn import functional as F

from afnext.bench.ops.guarded import guarded
from afnext.kernels import linear_nf4 as module
from afnext.kernels.linear_nf4 import LEVELS, linear_nf4, linear_nf4_swiglu
from afnext.kernels.packed_product import FEW_CPU_ROWS
from afnext.kernels.packed_weight import Packed


def weights(columns: int, inner: int, device: torch.device) -> Packed:
    codes = torch.randint(0, 256, (columns, inner // 2), dtype=torch.uint8).to(device)
    return Packed(codes, (torch.rand(columns, inner // 64) / inner**0.5).to(device))


def dense(packed: Packed) -> Tensor:
    codes, scales, _ = packed
    weight = torch.empty(len(codes), 2 * codes.shape[1], dtype=torch.float64, device=codes.device)
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device).double()
    for k in range(weight.shape[1]):
        code = codes[:, k // 2] & 15 if k % 2 else codes[:, k // 2] >> 4
        weight[:, k] = levels[code.long()] * scales[:, k // 64].double()
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128, 33), (5, 192, 16), (40, 64, 1), (19, 192, 33), (70, 320, 129)])
@pytest.mark.parametrize("backend", backends(module.NF4.single))
def test_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = torch.randn(rows, inner).to(device, dtype)
    weight = weights(columns, inner, device)
    bias, residual = torch.randn(columns).to(device, dtype), torch.randn(rows, columns).to(device, dtype)
    with poisoned(backend):
        actual = linear_nf4(x, weight, bias, residual)
    exact = exactly(linear_nf4, x, weight, bias, residual)
    assert_accurate(actual, exact, F.linear(x, dense(weight).to(dtype), bias) + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 192, 33), (5, 128, 16), (19, 64, 70)])
@pytest.mark.parametrize("backend", backends(module.NF4.pair))
def test_swiglu_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = torch.randn(rows, inner).to(device, dtype)
    gate, up = (weights(columns, inner, device) for _ in range(2))
    with poisoned(backend):
        actual = linear_nf4_swiglu(x, gate, up)
    gated, raised = (F.linear(x, dense(weight).to(dtype)) for weight in (gate, up))
    assert_accurate(actual, exactly(linear_nf4_swiglu, x, gate, up), F.silu(gated) * raised)


@pytest.mark.parametrize("backend", backends(module.NF4.single, module.NF4.pair))
def test_strided_and_empty_inputs(backend: str, seed: int, device: torch.device) -> None:
    x = torch.randn(5, 2, 256).to(device)[..., :128]
    codes, scales = torch.randint(0, 256, (20, 64), dtype=torch.uint8).to(device), torch.rand(2, 20).to(device).T
    with poisoned(backend):
        assert torch.equal(
            linear_nf4(x, Packed(codes, scales)), linear_nf4(x.contiguous(), Packed(codes, scales.contiguous()))
        )
        assert linear_nf4(x[:0], Packed(codes, scales)).shape == (0, 2, 20)
        assert linear_nf4_swiglu(x[:0], Packed(codes, scales), Packed(codes, scales)).shape == (0, 2, 20)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 19, 50])
@pytest.mark.parametrize("backend", native_backends(module.NF4.single, module.NF4.pair))
def test_native_stays_within_its_memory(
    backend: str, rows: int, threads: int, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same.

    Many rows may be added up by torch, whose order depends on the threads.
    """
    tolerance = {"rtol": 0, "atol": 0 if rows <= FEW_CPU_ROWS else 0.05}
    codes, scales = torch.randint(0, 256, (53, 96), dtype=torch.uint8), torch.rand(53, 3) / 10
    x, bias, residual = torch.randn(rows, 192).bfloat16(), torch.randn(53), torch.randn(rows, 53).bfloat16()
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = linear_nf4(x, Packed(codes, scales), bias, residual)
        pair = linear_nf4_swiglu(x, Packed(codes, scales), Packed(codes, scales))
    torch.set_num_threads(threads)
    x, codes, scales, bias, residual = map(guarded, (x, codes, scales, bias, residual))
    with poisoned(backend):
        torch.testing.assert_close(linear_nf4(x, Packed(codes, scales), bias, residual), expected, **tolerance)
        torch.testing.assert_close(
            linear_nf4_swiglu(x, Packed(codes, scales), Packed(codes, scales)), pair, **tolerance
        )


def test_reference_is_the_dense_product(seed: int) -> None:
    x, scales = torch.randn(3, 128, dtype=torch.float64), torch.rand(5, 2)
    codes = torch.randint(0, 256, (5, 64), dtype=torch.uint8)
    torch.testing.assert_close(exactly(linear_nf4, x, Packed(codes, scales)), x @ dense(Packed(codes, scales)).T)


def test_refusals() -> None:
    x, codes, scales = torch.zeros(2, 128), torch.zeros(5, 64, dtype=torch.uint8), torch.zeros(5, 2)
    cases = [
        (lambda: linear_nf4(x[:, :64], Packed(codes, scales)), r"\(2, 64\)"),
        (lambda: linear_nf4(x[:, :96], Packed(codes[:, :48].contiguous(), scales)), "multiple of 64"),
        (lambda: linear_nf4(x, Packed(codes.char(), scales)), "uint8"),
        (lambda: linear_nf4(x, Packed(codes, scales[:4])), "scales"),
        (lambda: linear_nf4(x, Packed(codes, scales), torch.zeros(4)), "bias"),
        (lambda: linear_nf4_swiglu(x, Packed(codes, scales), Packed(codes[:4], scales[:4])), "one shape"),
        (lambda: linear_nf4_swiglu(x, Packed(codes, scales), Packed(codes, scales[:4])), "scales"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
