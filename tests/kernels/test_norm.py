"""Norms against torch's and transformers' own, and every backend against the float64 reference."""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, poisoned
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from afnext.kernels import norm
from afnext.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

SHAPES = [(1, 67), (31, 16), (2, 5, 131), (1, 4, 1280), (2, 1, 3584), (1, 8191), (31, 1)]
OPERATIONS = (norm._layer_norm, norm._rms_norm, norm._add_layer_norm, norm._add_rms_norm)


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x.float()
    deviation = wide - wide.mean(-1, keepdim=True)
    return (deviation / (deviation.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight + bias


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """x, residual, weight, bias; x is not centered, as activations are not."""
    x = 2 * torch.randn(shape) + 1
    channels = shape[-1]
    tensors = (x, torch.randn(shape), 1 + 0.3 * torch.randn(channels), torch.randn(channels))
    return tuple(t.to(device, dtype) for t in tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_references_agree_with_torch_and_transformers(shape: tuple[int, ...], seed: int) -> None:
    x, _, weight, bias = inputs(shape, torch.float64, torch.device("cpu"))
    expected = F.layer_norm(x, weight.shape, weight, bias, 1e-5)
    torch.testing.assert_close(exactly(layer_norm, x, weight, bias), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(exactly(rms_norm, x, weight), F.rms_norm(x, weight.shape, weight, 1e-6))
    qwen = Qwen2RMSNorm(shape[-1], eps=1e-6)
    qwen.weight.data = weight.float()
    torch.testing.assert_close(exactly(rms_norm, x, weight).float(), qwen(x.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(norm._layer_norm, norm._add_layer_norm))
def test_layer_norm_accuracy(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    x, residual, weight, bias = inputs(shape, dtype, device)
    with poisoned(backend):
        alone = layer_norm(x, weight, bias)
        normed, hidden = add_layer_norm(x, residual, weight, bias)
    assert_accurate(alone, exactly(layer_norm, x, weight, bias), plain_layer_norm(x, weight, bias, 1e-5))
    assert torch.equal(hidden, x + residual)
    assert_accurate(normed, exactly(layer_norm, hidden, weight, bias), plain_layer_norm(hidden, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(norm._rms_norm, norm._add_rms_norm))
def test_rms_norm_accuracy(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    x, residual, weight, _ = inputs(shape, dtype, device)
    with poisoned(backend):
        alone = rms_norm(x, weight)
        normed, hidden = add_rms_norm(x, residual, weight)
    assert_accurate(alone, exactly(rms_norm, x, weight), plain_rms_norm(x, weight, 1e-6))
    assert torch.equal(hidden, x + residual)
    assert_accurate(normed, exactly(rms_norm, hidden, weight), plain_rms_norm(hidden, weight, 1e-6))


@pytest.mark.parametrize("backend", ["reference", *backends(*OPERATIONS)])
def test_eps_is_used(backend: str, seed: int, device: torch.device) -> None:
    """With eps far above the variance the norm is a division by sqrt(eps)."""
    x = 1e-3 * torch.randn(3, 64).to(device)
    one, zero = torch.ones(64, device=device), torch.zeros(64, device=device)
    centered = x - x.mean(-1, keepdim=True)
    with poisoned(backend):
        torch.testing.assert_close(layer_norm(x, one, zero, 4.0), centered / 2, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(rms_norm(x, one, 4.0), x / 2, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(add_layer_norm(x, x, one, zero, 4.0)[0], centered, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(add_rms_norm(x, x, one, 4.0)[0], x, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", backends(*OPERATIONS))
def test_statistics_are_float32(backend: str, seed: int, device: torch.device) -> None:
    """Squares beyond float16's range, and a mean a thousand times the deviation, leave the result intact."""
    large = (6e4 * (2 * torch.rand(3, 640) - 1)).to(device, torch.float16)
    offset = (1000 + torch.randn(67, 640)).to(device)
    weight, bias = torch.ones(640, device=device), torch.zeros(640, device=device)
    with poisoned(backend):
        scaled = rms_norm(large, weight.half())
        centered = layer_norm(offset, weight, bias)
    assert_accurate(scaled, exactly(rms_norm, large, weight), plain_rms_norm(large, weight.half(), 1e-6))
    assert_accurate(centered, exactly(layer_norm, offset, weight, bias), plain_layer_norm(offset, weight, bias, 1e-5))


@pytest.mark.parametrize("backend", backends(*OPERATIONS))
def test_strided_inputs(backend: str, seed: int, device: torch.device) -> None:
    """Rows apart from each other, and channels apart from each other."""
    x, residual, weight, bias = inputs((3, 2, 40), torch.float32, device)
    for cut in (lambda t: t[:, 0, 3:36], lambda t: t[:, :, 1:34:2], lambda t: t.transpose(1, 2)[:, 4:37]):
        part, stream = cut(x), cut(residual)
        width = part.shape[-1]
        scale, shift = weight[:width], bias.repeat(2)[::2][:width]
        with poisoned(backend):
            torch.testing.assert_close(rms_norm(part, scale), rms_norm(part.contiguous(), scale))
            actual = add_layer_norm(part, stream, scale, shift)
            expected = add_layer_norm(part.contiguous(), stream.contiguous(), scale, shift.contiguous())
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", backends(*OPERATIONS))
def test_inputs_are_left_alone(backend: str, seed: int, device: torch.device) -> None:
    x, residual, weight, bias = inputs((2, 3, 33), torch.bfloat16, device)
    before = x.clone(), residual.clone()
    with poisoned(backend):
        add_layer_norm(x, residual, weight, bias)
        add_rms_norm(x, residual, weight)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_wrong_shapes() -> None:
    x, eight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"\(2, 8\).*\(7,\)"):
        rms_norm(x, torch.zeros(7))
    with pytest.raises(ValueError, match=r"\(2, 8\).*\(1,\)"):
        layer_norm(x, torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(7,\)"):
        layer_norm(x, eight, torch.zeros(7))
    with pytest.raises(ValueError, match=r"\(8,\).*\(2, 8\)"):
        add_rms_norm(x, torch.zeros(8), eight)
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(2, 8\)"):
        add_layer_norm(x, torch.zeros(2, 7), eight, eight)
