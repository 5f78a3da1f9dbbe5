"""The convolution stem against torch's convolutions, and every backend against the float64 reference."""

import re

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, poisoned
from torch import Tensor
from torch.nn import functional as F

from afnext.kernels import activation
from afnext.kernels import conv_stem as module
from afnext.kernels.conv_stem import conv_length, conv_stem

# batch, mel bins, hidden, frames; the shortest come in batches, because the error of a few values is a matter of luck
SHAPES = [(67, 5, 7, 1), (64, 5, 7, 2), (31, 3, 11, 3), (9, 8, 13, 17), (1, 128, 40, 100), (2, 80, 64, 31)]
SPARE_POSITIONS = 3


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """mel, weights and biases, positions; the positions past the end are NaN."""
    batch, mel_bins, hidden, frames = shape
    used = (frames + 1) // 2
    positions = torch.randn(used + SPARE_POSITIONS, hidden)
    positions[used:] = torch.nan
    tensors = (
        torch.randn(batch, mel_bins, frames),
        torch.randn(hidden, mel_bins, 3) / (3 * mel_bins) ** 0.5,
        torch.randn(hidden),
        torch.randn(hidden, hidden, 3) / (3 * hidden) ** 0.5,
        torch.randn(hidden),
        positions,
    )
    return tuple(t.to(device, dtype) for t in tensors)


def plain(mel: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor) -> Tensor:
    """Each convolution as a product with the unfolded frames."""
    h = mel
    for weight, bias, stride in ((weight1, bias1, 1), (weight2, bias2, 2)):
        neighbours = F.pad(h, (1, 1)).unfold(-1, 3, stride)
        h = torch.einsum("bctk,ock->bot", neighbours, weight) + bias[:, None]
        h = F.gelu(h)
    return h.transpose(1, 2) + positions[: h.shape[-1]]


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_agrees_with_torch(shape: tuple[int, int, int, int], seed: int) -> None:
    tensors = inputs(shape, torch.float64, torch.device("cpu"))
    mel, weight1, bias1, weight2, bias2, positions = tensors
    h = F.gelu(F.conv1d(mel, weight1, bias1, padding=1))
    h = F.gelu(F.conv1d(h, weight2, bias2, stride=2, padding=1)).transpose(1, 2)
    torch.testing.assert_close(exactly(conv_stem, *tensors), h + positions[: h.shape[1]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(module._operation, activation._gelu))
def test_accuracy(
    backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    tensors = inputs(shape, dtype, device)
    with poisoned(backend):
        actual = conv_stem(*tensors)
    assert_accurate(actual, exactly(conv_stem, *tensors), plain(*tensors))


def test_conv_length_is_that_of_a_strided_convolution() -> None:
    for frames in range(1, 60):
        out = F.conv1d(torch.zeros(1, 1, frames), torch.zeros(1, 1, 3), stride=2, padding=1)
        assert conv_length(frames) == out.shape[-1]
    assert conv_length(0) == 0
    assert conv_length(3000) == 1500


def test_wrong_shapes() -> None:
    good = {
        "mel": torch.zeros(1, 4, 9),
        "weight1": torch.zeros(6, 4, 3),
        "bias1": torch.zeros(6),
        "weight2": torch.zeros(6, 6, 3),
        "bias2": torch.zeros(6),
        "positions": torch.zeros(5, 6),
    }
    assert conv_stem(**good).shape == (1, 5, 6)
    with pytest.raises(ValueError, match="9 mel frames need 5 positions, the encoder has 4"):
        conv_stem(**{**good, "positions": torch.zeros(4, 6)})
    for name, shape in {
        "mel": (1, 5, 9),
        "weight1": (6, 4, 5),
        "bias1": (5,),
        "weight2": (6, 4, 3),
        "bias2": (1,),
        "positions": (5, 1),
    }.items():
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            conv_stem(**{**good, name: torch.zeros(shape)})
