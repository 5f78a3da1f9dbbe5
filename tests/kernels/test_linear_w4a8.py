"""W4A8 linear layers: every backend against the float64 reference, and what rounding the activations costs.

Triton's kernels are W4A16's for few rows, so they are held to that reference there.
"""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, native_backends, poisoned
from support.int8_products import rounds_inputs, spare_the_interpreter
from torch import Tensor
from torch.nn import functional as F

from afnext.bench.ops.guarded import guarded
from afnext.kernels import linear_w4a8 as module
from afnext.kernels.linear_int4 import linear_int4, linear_int4_swiglu
from afnext.kernels.linear_w4a8 import linear_w4a8, linear_w4a8_swiglu
from afnext.kernels.packed_product import FEW_CPU_ROWS
from afnext.kernels.packed_weight import Packed


def weights(columns: int, inner: int, group: int, zeros: bool, device: torch.device) -> Packed:
    packed = torch.randint(0, 256, (columns, inner // 2), dtype=torch.uint8).to(device)
    scales = (torch.rand(columns, inner // group) / inner**0.5).bfloat16().to(device)
    return Packed(packed, scales, torch.rand_like(scales) * 15 if zeros else None)


def dense(packed: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    weight = torch.empty(len(packed), 2 * packed.shape[1], dtype=torch.float64, device=packed.device)
    group = weight.shape[1] // scales.shape[1]
    for k in range(weight.shape[1]):
        code = packed[:, k // 2] >> 4 if k % 2 else packed[:, k // 2] & 15
        zero = 8 if zeros is None else zeros[:, k // group].double()
        weight[:, k] = (code.double() - zero) * scales[:, k // group].double()
    return weight


def rounded(x: Tensor, group: int) -> Tensor:
    """x with every group of it in 255 steps of its largest."""
    groups = x.double().unflatten(-1, (-1, group))
    step = groups.abs().amax(-1, keepdim=True) / 127
    return (torch.round(groups / step) * step).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 1024, 161, 64), (5, 960, 16, 32), (19, 320, 70, 64), (40, 256, 33, 128), (70, 96, 40, 32), (401, 320, 1, 64)],
)
@pytest.mark.parametrize("backend", backends(module.W4A8.single))
def test_accuracy(
    backend: str,
    shape: tuple[int, int, int, int],
    zeros: bool,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, inner, columns, group = shape
    x = torch.randn(rows, inner).to(device, dtype)
    weight = weights(columns, inner, group, zeros, device)
    bias, residual = torch.randn(columns).to(device, dtype), torch.randn(rows, columns).to(device, dtype)
    spare_the_interpreter(backend, rows * inner // group, module, monkeypatch)
    with poisoned(backend):
        actual = linear_w4a8(x, weight, bias, residual)
    rounds = rounds_inputs(backend, rows)
    tokens = rounded(x, group).to(dtype) if rounds else x
    exact = exactly(linear_w4a8 if rounds else linear_int4, x, weight, bias, residual)
    assert_accurate(actual, exact, F.linear(tokens, dense(*weight).to(dtype), bias) + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", [(1, 128, 48, 64), (9, 160, 37, 32), (66, 320, 129, 64), (530, 128, 33, 128)])
@pytest.mark.parametrize("backend", backends(module.W4A8.pair))
def test_swiglu_accuracy(
    backend: str,
    shape: tuple[int, int, int, int],
    zeros: bool,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, inner, columns, group = shape
    x = (3 * torch.randn(rows, inner)).to(device, dtype)
    gate, up = (weights(columns, inner, group, zeros, device) for _ in range(2))
    spare_the_interpreter(backend, rows * inner // group, module, monkeypatch)
    with poisoned(backend):
        actual = linear_w4a8_swiglu(x, gate, up)
    rounds = rounds_inputs(backend, rows)
    tokens = rounded(x, group).to(dtype) if rounds else x
    gated, raised = (F.linear(tokens, dense(*weight).to(dtype)) for weight in (gate, up))
    exact = exactly(linear_w4a8_swiglu if rounds else linear_int4_swiglu, x, gate, up)
    assert_accurate(actual, exact, F.silu(gated) * raised)


def test_reference_rounds_the_activations_of_each_group(seed: int) -> None:
    x, weight = torch.randn(3, 128, dtype=torch.float64), weights(5, 128, 64, True, torch.device("cpu"))
    torch.testing.assert_close(exactly(linear_w4a8, x, weight), rounded(x, 64) @ dense(*weight).T, rtol=1e-5, atol=1e-5)


def test_rounding_costs_a_hundredth_of_the_product(seed: int) -> None:
    x, weight = torch.randn(200, 1024), weights(50, 1024, 64, False, torch.device("cpu"))
    plain = linear_int4(x, weight)
    error = (linear_w4a8(x, weight) - plain).square().mean().sqrt() / plain.square().mean().sqrt()
    assert 0.001 < float(error) < 0.01


@pytest.mark.parametrize("backend", backends(module.W4A8.single))
def test_strided_empty_and_zero_inputs(backend: str, seed: int, device: torch.device) -> None:
    x = torch.randn(5, 2, 256).to(device)[..., :128]
    weight = weights(40, 128, 64, False, device)
    with poisoned(backend):
        assert torch.equal(linear_w4a8(x, weight), linear_w4a8(x.contiguous(), weight))
        assert linear_w4a8(x[:0], weight).shape == (0, 2, 40)
        assert linear_w4a8(torch.zeros_like(x), weight).eq(0).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 19, 50])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("backend", native_backends(module.W4A8.single))
def test_native_stays_within_its_memory(
    backend: str, group: int, rows: int, threads: int, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same.

    Many rows may be added up by torch, whose order depends on the threads.
    """
    tolerance = {"rtol": 0, "atol": 0 if rows <= FEW_CPU_ROWS else 0.05}
    packed, scales, zeros = weights(53, 192, group, True, torch.device("cpu"))
    x, bias, residual = torch.randn(rows, 192).bfloat16(), torch.randn(53), torch.randn(rows, 53).bfloat16()
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = linear_w4a8(x, Packed(packed, scales, zeros), bias, residual)
    torch.set_num_threads(threads)
    x, packed, scales, zeros, bias, residual = map(guarded, (x, packed, scales, zeros, bias, residual))
    with poisoned(backend):
        torch.testing.assert_close(linear_w4a8(x, Packed(packed, scales, zeros), bias, residual), expected, **tolerance)


def test_refusals() -> None:
    x, packed, scales = torch.zeros(2, 128), torch.zeros(5, 64, dtype=torch.uint8), torch.zeros(5, 2)
    cases = [
        (lambda: linear_w4a8(x[:, :64], Packed(packed, scales)), r"\(2, 64\)"),
        (lambda: linear_w4a8(x, Packed(packed.char(), scales)), "uint8"),
        (lambda: linear_w4a8(x, Packed(packed, scales[:4])), "scales"),
        (lambda: linear_w4a8(x, Packed(packed, scales), torch.zeros(4)), "bias"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
