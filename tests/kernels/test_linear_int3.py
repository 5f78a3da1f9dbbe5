"""int3 linear layers: every backend against the float64 reference, the error against a plain product, and int4."""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, native_backends, poisoned
from torch import Tensor
from torch.nn import functional as F

from afnext.bench.ops.guarded import guarded
from afnext.kernels import linear_int3 as module
from afnext.kernels.linear_int3 import linear_int3, linear_int3_swiglu
from afnext.kernels.linear_int4 import linear_int4, linear_int4_swiglu
from afnext.kernels.packed_product import FEW_CPU_ROWS
from afnext.kernels.packed_weight import Packed

# rows, in, out, group
SHAPES = [(1, 512, 96, 128), (5, 384, 37, 64), (19, 128, 33, 32), (33, 256, 70, 128), (70, 128, 131, 32)]


def weights(columns: int, inner: int, group: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Packed:
    packed = torch.randint(0, 256, (columns, 3 * inner // 8), dtype=torch.uint8).to(device)
    return Packed(packed, ((torch.rand(columns, inner // group) - 0.3) / 8 / inner**0.5).to(device, dtype))


def codes_of(packed: Tensor) -> Tensor:
    """The codes [out, in], one after the other: inputs 0 .. 95 of a block in bits 1 .. 3 of their half of a byte,
    inputs 96 .. 127 in the bits 0 of the same halves of three bytes."""
    codes = torch.empty(len(packed), packed.shape[1] // 3 * 8, dtype=torch.uint8, device=packed.device)
    for k in range(codes.shape[1]):
        block, i = divmod(k, 128)
        shift = 4 * (k % 2)
        stored = packed[:, 48 * block : 48 * (block + 1)] >> shift
        if i < 96:
            codes[:, k] = stored[:, i // 2] & 14
        else:
            at = (i - 96) // 2
            codes[:, k] = sum((stored[:, 16 * bit + at] & 1) << (bit + 1) for bit in range(3))
    return codes


def dense(weight: Packed) -> Tensor:
    codes, scales = codes_of(weight.codes), weight.scales
    return (codes.double() - 8) * scales.double().repeat_interleave(codes.shape[1] // scales.shape[1], 1)


def as_int4(weight: Packed) -> Packed:
    codes = codes_of(weight.codes)
    return Packed(codes[:, ::2] | codes[:, 1::2] << 4, weight.scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(module.INT3.single))
def test_accuracy(
    backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns, group = shape
    x = torch.randn(rows, inner).to(device, dtype)
    weight = weights(columns, inner, group, device)
    bias, residual = torch.randn(columns).to(device, dtype), torch.randn(rows, columns).to(device, dtype)
    with poisoned(backend):
        actual = linear_int3(x, weight, bias, residual)
    exact = exactly(linear_int3, x, weight, bias, residual)
    assert_accurate(actual, exact, F.linear(x, dense(weight).to(dtype), bias) + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 256, 33, 64), (5, 128, 16, 32), (19, 128, 70, 128)])
@pytest.mark.parametrize("backend", backends(module.INT3.pair))
def test_swiglu_accuracy(
    backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns, group = shape
    x = torch.randn(rows, inner).to(device, dtype)
    gate, up = (weights(columns, inner, group, device, torch.float16) for _ in range(2))
    with poisoned(backend):
        actual = linear_int3_swiglu(x, gate, up)
    gated, raised = (F.linear(x, dense(weight).to(dtype)) for weight in (gate, up))
    assert_accurate(actual, exactly(linear_int3_swiglu, x, gate, up), F.silu(gated) * raised)


@pytest.mark.parametrize("backend", native_backends(module.INT3.single, module.INT3.pair))
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_products_are_those_of_int4(dtype: torch.dtype, rows: int, backend: str, seed: int) -> None:
    x, device = torch.randn(rows, 384).to(dtype), torch.device("cpu")
    gate, up = (weights(70, 384, 64, device) for _ in range(2))
    four = [as_int4(weight) for weight in (gate, up)]
    with poisoned(backend):
        assert torch.equal(linear_int3(x, gate), linear_int4(x, four[0]))
        assert torch.equal(linear_int3_swiglu(x, gate, up), linear_int4_swiglu(x, *four))


@pytest.mark.parametrize("backend", backends(module.INT3.single, module.INT3.pair))
def test_strided_and_empty_inputs(backend: str, seed: int, device: torch.device) -> None:
    x = torch.randn(5, 2, 256).to(device)[..., :128]
    weight = weights(20, 128, 64, device)
    with poisoned(backend):
        assert torch.equal(linear_int3(x, weight), linear_int3(x.contiguous(), weight))
        assert linear_int3(x[:0], weight).shape == (0, 2, 20)
        assert linear_int3_swiglu(x[:0], weight, weight).shape == (0, 2, 20)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 7, 19])
@pytest.mark.parametrize("backend", native_backends(module.INT3.single, module.INT3.pair))
def test_native_stays_within_its_memory(
    backend: str, rows: int, threads: int, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same.

    Many rows may be added up by torch, whose order depends on the threads.
    """
    tolerance = {"rtol": 0, "atol": 0 if rows <= FEW_CPU_ROWS else 0.05}
    packed, scales, _ = weights(53, 384, 32, torch.device("cpu"))
    x, bias, residual = torch.randn(rows, 384).bfloat16(), torch.randn(53), torch.randn(rows, 53).bfloat16()
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = linear_int3(x, Packed(packed, scales), bias, residual)
        pair = linear_int3_swiglu(x, Packed(packed, scales), Packed(packed, scales))
    torch.set_num_threads(threads)
    x, packed, scales, bias, residual = map(guarded, (x, packed, scales, bias, residual))
    with poisoned(backend):
        torch.testing.assert_close(linear_int3(x, Packed(packed, scales), bias, residual), expected, **tolerance)
        torch.testing.assert_close(
            linear_int3_swiglu(x, Packed(packed, scales), Packed(packed, scales)), pair, **tolerance
        )


def test_reference_is_the_dense_product(seed: int) -> None:
    x, weight = torch.randn(3, 256, dtype=torch.float64), weights(5, 256, 64, torch.device("cpu"))
    torch.testing.assert_close(exactly(linear_int3, x, weight), x @ dense(weight).T)


def test_refusals() -> None:
    x, packed, scales = torch.zeros(2, 128), torch.zeros(5, 48, dtype=torch.uint8), torch.zeros(5, 2)
    cases = [
        (lambda: linear_int3(x[:, :64], Packed(packed, scales)), r"\(2, 64\)"),
        (lambda: linear_int3(x[:, :64], Packed(packed[:, :24].contiguous(), scales)), "part of them"),
        (lambda: linear_int3(x, Packed(packed.char(), scales)), "uint8"),
        (lambda: linear_int3(x, Packed(packed, torch.zeros(5, 8))), "group of"),
        (lambda: linear_int3(x, Packed(packed, scales[:4])), "scales"),
        (lambda: linear_int3(x, Packed(packed, scales), torch.zeros(4)), "bias"),
        (lambda: linear_int3_swiglu(x, Packed(packed, scales), Packed(packed[:4], scales[:4])), "one shape"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
