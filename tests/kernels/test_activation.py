"""Activations against the normal distribution and torch's silu, every backend against the float64 reference."""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, poisoned
from torch import Tensor
from torch.nn import functional as F

from afnext.kernels import activation
from afnext.kernels.activation import gelu, swiglu

SHAPES = [(101,), (7, 13), (2, 3, 257), (1, 1, 5, 31)]


def plain_gelu(x: Tensor) -> Tensor:
    wide = x.float()
    return (0.5 * wide * (1 + torch.erf(wide / 2**0.5))).to(x.dtype)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def test_gelu_reference_is_x_times_the_normal_distribution(seed: int) -> None:
    x = 4 * torch.randn(1001, dtype=torch.float64)
    torch.testing.assert_close(exactly(gelu, x), x * torch.special.ndtr(x), rtol=1e-12, atol=1e-14)


def test_swiglu_reference_is_silu_times_up(seed: int) -> None:
    gate, up = 4 * torch.randn(2, 1001, dtype=torch.float64)
    torch.testing.assert_close(exactly(swiglu, gate, up), F.silu(gate) * up, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(activation._gelu))
def test_gelu_accuracy(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    x = (3 * torch.randn(shape)).to(device, dtype)
    with poisoned(backend):
        actual = gelu(x)
    assert_accurate(actual, exactly(gelu, x), plain_gelu(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(activation._swiglu))
def test_swiglu_accuracy(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    gate, up = (3 * torch.randn(2, *shape)).to(device, dtype)
    with poisoned(backend):
        actual = swiglu(gate, up)
    assert_accurate(actual, exactly(swiglu, gate, up), plain_swiglu(gate, up))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("backend", backends(activation._gelu))
def test_gelu_accuracy_near_zero_and_far_from_it(backend: str, scale: float, seed: int, device: torch.device) -> None:
    x = (scale * torch.randn(20_011)).to(device)
    with poisoned(backend):
        actual = gelu(x)
    assert_accurate(actual, exactly(gelu, x), plain_gelu(x))


@pytest.mark.parametrize("backend", backends(activation._gelu, activation._swiglu))
def test_strided_inputs(backend: str, seed: int, device: torch.device) -> None:
    gate, up = torch.randn(5, 2 * 37).to(device).chunk(2, dim=-1)
    transposed = torch.randn(11, 19).to(device).T
    with poisoned(backend):
        torch.testing.assert_close(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
        torch.testing.assert_close(gelu(transposed), gelu(transposed.contiguous()))


@pytest.mark.parametrize("backend", backends(activation._gelu, activation._swiglu))
def test_far_from_zero(backend: str, device: torch.device) -> None:
    """Where exp overflows float32 the result is x or 0, never NaN."""
    x = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4], device=device)
    with poisoned(backend):
        torch.testing.assert_close(gelu(x), x.clamp_min(0), rtol=0, atol=0)
        torch.testing.assert_close(swiglu(x, torch.ones_like(x)), x.clamp_min(0), rtol=0, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends(activation._gelu, activation._swiglu))
def test_nan_stays_nan(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    x = torch.randn(101).to(device, dtype)
    nan = torch.rand(101).to(device) < 0.3
    x[nan] = torch.nan
    with poisoned(backend):
        assert gelu(x).isnan().equal(nan)
        assert swiglu(x, x).isnan().equal(nan)


@pytest.mark.parametrize("backend", backends(activation._gelu, activation._swiglu))
def test_one_element(backend: str, seed: int, device: torch.device) -> None:
    for x in (3 * torch.randn(20)).to(device).split(1):
        with poisoned(backend):
            torch.testing.assert_close(gelu(x).double(), exactly(gelu, x), rtol=0, atol=3e-6)
            torch.testing.assert_close(swiglu(x, x).double(), exactly(swiglu, x, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", backends(activation._gelu, activation._swiglu))
def test_no_elements(backend: str, device: torch.device) -> None:
    x = torch.empty(0, 64, device=device)
    with poisoned(backend):
        assert gelu(x).shape == swiglu(x, x).shape == (0, 64)


@pytest.mark.parametrize(
    ("gate", "up"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(2, 3), torch.zeros(3)),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16)),
    ],
)
def test_swiglu_refuses_unlike_tensors(gate: Tensor, up: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        swiglu(gate, up)
