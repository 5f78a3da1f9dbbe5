"""int8 linear layers in groups: every backend against the float64 reference, the error against a plain product."""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, native_backends, poisoned
from support.int8_products import product
from torch import Tensor
from torch.nn import functional as F

from afnext.bench.ops.guarded import guarded
from afnext.kernels import linear_int8_groups as module
from afnext.kernels.linear_int8_groups import linear_int8_groups, linear_int8_groups_swiglu
from afnext.kernels.packed_product import FEW_CPU_ROWS
from afnext.kernels.packed_weight import Packed

# rows, in, out, group, with zeros, dtype of the scales
SHAPES = [
    (1, 256, 70, 128, False, torch.float16),
    (3, 96, 37, 16, True, torch.float32),
    (33, 128, 40, 64, False, torch.bfloat16),
    (70, 64, 131, 32, True, torch.float16),
    (131, 64, 1, 16, False, torch.float32),
]


def weights(
    columns: int, inner: int, group: int, with_zeros: bool, device: torch.device, dtype: torch.dtype = torch.float32
) -> Packed:
    codes = torch.randint(-128, 128, (columns, inner), dtype=torch.int8).to(device)
    scales = (torch.rand(columns, inner // group) / 100 / inner**0.5).to(device, dtype)
    return Packed(codes, scales, (40 * torch.randn(scales.shape)).to(device, dtype) if with_zeros else None)


def dense(codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    group = codes.shape[1] // scales.shape[1]
    weight = torch.empty(codes.shape, device=codes.device)
    for k in range(codes.shape[1]):
        zero = 0 if zeros is None else zeros[:, k // group].float()
        weight[:, k] = (codes[:, k].float() - zero) * scales[:, k // group].float()
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(module.INT8_GROUPS.single))
def test_accuracy(
    backend: str,
    shape: tuple[int, int, int, int, bool, torch.dtype],
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
) -> None:
    rows, inner, columns, group, with_zeros, scale_dtype = shape
    x, bias = torch.randn(rows, inner).to(device, dtype), torch.randn(columns).to(device, dtype)
    residual = torch.randn(rows, columns).to(device, dtype)
    weight = weights(columns, inner, group, with_zeros, device, scale_dtype)
    with poisoned(backend):
        plain, whole = linear_int8_groups(x, weight), linear_int8_groups(x, weight, bias, residual)
    y = product(x, dense(*weight, dtype))
    assert_accurate(plain, exactly(linear_int8_groups, x, weight), y)
    assert_accurate(whole, exactly(linear_int8_groups, x, weight, bias, residual), y + bias + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 256, 48, 128, False), (9, 96, 37, 16, True), (66, 64, 70, 32, True)])
@pytest.mark.parametrize("backend", backends(module.INT8_GROUPS.pair))
def test_swiglu_accuracy(
    backend: str,
    shape: tuple[int, int, int, int, bool],
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
) -> None:
    rows, inner, columns, group, with_zeros = shape
    x = (3 * torch.randn(rows, inner)).to(device, dtype)
    gate, up = (weights(columns, inner, group, with_zeros, device) for _ in range(2))
    with poisoned(backend):
        actual = linear_int8_groups_swiglu(x, gate, up)
    plain = F.silu(product(x, dense(*gate, dtype))) * product(x, dense(*up, dtype))
    assert_accurate(actual, exactly(linear_int8_groups_swiglu, x, gate, up), plain)


@pytest.mark.parametrize("backend", backends(module.INT8_GROUPS.single, module.INT8_GROUPS.pair))
def test_strided_and_empty_inputs(backend: str, seed: int, device: torch.device) -> None:
    x = torch.randn(5, 2, 256).to(device)[..., :128]
    codes, scales, zeros = weights(20, 128, 32, True, device)
    with poisoned(backend):
        assert torch.equal(
            linear_int8_groups(x, Packed(codes, scales, zeros)),
            linear_int8_groups(x.contiguous(), Packed(codes, scales, zeros)),
        )
        assert linear_int8_groups(x[:0], Packed(codes, scales, zeros)).shape == (0, 2, 20)
        assert linear_int8_groups_swiglu(x[:0], Packed(codes, scales), Packed(codes, scales)).shape == (0, 2, 20)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 7, 19])
@pytest.mark.parametrize("backend", native_backends(module.INT8_GROUPS.single, module.INT8_GROUPS.pair))
def test_native_stays_within_its_memory(
    backend: str, rows: int, threads: int, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same.

    Many rows are added up by torch, whose order depends on the threads.
    """
    tolerance = {"rtol": 0, "atol": 0 if rows <= FEW_CPU_ROWS else 0.05}
    codes, scales, zeros = weights(53, 208, 16, True, torch.device("cpu"))
    x, bias, residual = torch.randn(rows, 208).bfloat16(), torch.randn(53), torch.randn(rows, 53).bfloat16()
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = linear_int8_groups(x, Packed(codes, scales, zeros), bias, residual)
        pair = linear_int8_groups_swiglu(x, Packed(codes, scales), Packed(codes, scales))
    torch.set_num_threads(threads)
    x, codes, scales, zeros, bias, residual = map(guarded, (x, codes, scales, zeros, bias, residual))
    with poisoned(backend):
        actual = linear_int8_groups(x, Packed(codes, scales, zeros), bias, residual)
        torch.testing.assert_close(actual, expected, **tolerance)
        torch.testing.assert_close(
            linear_int8_groups_swiglu(x, Packed(codes, scales), Packed(codes, scales)), pair, **tolerance
        )


def test_refusals() -> None:
    x, codes, scales = torch.zeros(2, 64), torch.zeros(5, 64, dtype=torch.int8), torch.zeros(5, 4)
    cases = [
        (lambda: linear_int8_groups(x[:, :32], Packed(codes, scales)), r"\(2, 32\)"),
        (lambda: linear_int8_groups(x, Packed(codes.byte(), scales)), "int8"),
        (lambda: linear_int8_groups(x, Packed(codes, torch.zeros(5, 8))), "group of"),
        (lambda: linear_int8_groups(x, Packed(codes, scales[:4])), "scales"),
        (lambda: linear_int8_groups(x, Packed(codes, scales, scales.half())), "zeros must be like scales"),
        (lambda: linear_int8_groups(x, Packed(codes, scales), torch.zeros(4)), "bias"),
        (lambda: linear_int8_groups_swiglu(x, Packed(codes, scales), Packed(codes[:4], scales[:4])), "one shape"),
        (lambda: linear_int8_groups_swiglu(x, Packed(codes, scales, scales), Packed(codes, scales)), "both or neither"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
