"""The convolution stem of the encoder: two GELU convolutions, then learned positions.

    h   = GELU(conv1(mel))           kernel 3, stride 1, padding 1     [batch, hidden, frames]
    h   = GELU(conv2(h))             kernel 3, stride 2, padding 1     [batch, hidden, conv_length(frames)]
    out = h^T + positions            [batch, conv_length(frames), hidden]

GELU is the exact one (erf). The convolutions are dense products and go to torch (cuDNN, oneDNN).
Operations for one window at full size: 2 * 3 * 3000 * 128 * 1280 + 2 * 3 * 1500 * 1280 * 1280 = 17.7 GFLOP.

Source: Radford et al. 2022, section 2.2.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import gelu
from .dispatch import Operation


def conv_length(frames: int) -> int:
    """Number of positions after the stride-2 convolution: ceil(frames / 2), and 0 for no frames."""
    return (frames - 1) // 2 + 1


def reference(mel: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor) -> Tensor:
    """The specification: float64, each convolution as a sum of three shifted products."""
    h = mel.double()
    for weight, bias, stride in ((weight1, bias1, 1), (weight2, bias2, 2)):
        length = (h.shape[-1] - 1) // stride + 1
        padded = F.pad(h, (1, 1))
        taps = [padded[:, :, tap : tap + stride * (length - 1) + 1 : stride] for tap in range(3)]
        h = torch.stack([weight.double()[:, :, tap] @ taps[tap] for tap in range(3)]).sum(0) + bias.double()[:, None]
        h = 0.5 * h * (1 + torch.erf(h * 0.5**0.5))
    return (h.transpose(1, 2) + positions[: h.shape[-1]].double()).to(mel.dtype)


_operation = Operation("conv_stem", reference)


@_operation.implementation("torch")
def _torch(mel: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor) -> Tensor:
    h = gelu(F.conv1d(mel, weight1, bias1, padding=1))
    h = gelu(F.conv1d(h, weight2, bias2, stride=2, padding=1))
    return h.transpose(1, 2) + positions[: h.shape[-1]]


def conv_stem(mel: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor) -> Tensor:
    """Mel frames to encoder inputs.

    mel: [batch, mel_bins, frames]; weight1: [hidden, mel_bins, 3]; weight2: [hidden, hidden, 3]; biases: [hidden];
    positions: [max_positions, hidden]. All of one dtype. Returns [batch, conv_length(frames), hidden] in it.
    Raises ValueError when shapes do not fit or the frames outrun the positions.
    """
    hidden = bias1.shape[0]
    parameters = [tuple(x.shape) for x in (weight1, bias1, weight2, bias2, positions[:1])]
    expected = [(hidden, *mel.shape[-2:-1], 3), (hidden,), (hidden, hidden, 3), (hidden,), (1, hidden)]
    if mel.ndim != 3 or parameters != expected:
        raise ValueError(
            "conv_stem takes mel [batch, mel_bins, frames], two pairs of weights with a kernel of 3 and biases, and "
            f"positions [max_positions, hidden], got {tuple(mel.shape)}, {parameters[:4]} and {tuple(positions.shape)}"
        )
    length = conv_length(mel.shape[-1])
    if length > positions.shape[0]:
        raise ValueError(f"{mel.shape[-1]} mel frames need {length} positions, the encoder has {positions.shape[0]}")
    return _operation.on(mel.device)(mel, weight1, bias1, weight2, bias2, positions)
