"""The convolution stem of the encoder: two GELU convolutions, then learned positions.

    h   = GELU(conv1(mel))           kernel 3, stride 1, padding 1     [batch, hidden, frames]
    h   = GELU(conv2(h))             kernel 3, stride 2, padding 1     [batch, hidden, conv_length(frames)]
    out = h^T + positions            [batch, conv_length(frames), hidden]

GELU is the exact one (erf). torch (cuDNN, oneDNN) computes the convolutions, except on CPUs where `linear` runs native
kernels: there they become a `linear` over the three neighbours of each step, laid side by side. FLOPs for one window at
full size: 2 * 3 * 3000 * 128 * 1280 + 2 * 3 * 1500 * 1280 * 1280 = 17.7 GFLOP.

On GPUs the libraries add the bias in a separate pass. The Triton implementation calls them without a bias and fuses
what follows: bias and GELU after the first convolution, in place; bias, GELU, transposition and positions after the
second. In bf16 and for one window at full size these passes move 15 and 12 MB, where one pass for each step would move
58 MB.

Source: Radford et al. 2022, section 2.2.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import exact_gelu, gelu
from .arguments import check_tensors
from .dispatch import Operation
from .linear import linear, linear_misfit
from .triton_language import tl, triton


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


@triton.jit(do_not_specialize=["rows", "length"])
def _bias_gelu_kernel(h, bias, rows, channels, length, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """GELU(h + bias) in place; h: [rows, length], rows = batch * channels."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    time = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    shift = tl.load(bias + row % channels).to(tl.float32)[:, None]
    inside = (row[:, None] < rows) & (time < length)
    at = h + row[:, None] * length + time
    values = exact_gelu(tl.load(at, mask=inside, other=0.0).to(tl.float32) + shift)
    tl.store(at, values.to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def _finish_kernel(h, bias, positions, out, channels, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """GELU(h + bias)^T + positions. h: [batch, channels, length]; out: [batch, length, channels]."""
    batch = tl.program_id(2).to(tl.int64)
    time = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h += batch * channels * length
    out += batch * channels * length
    inside = (channel[:, None] < channels) & (time[None, :] < length)
    values = tl.load(h + channel[:, None] * length + time[None, :], mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[:, None]
    values = tl.trans(exact_gelu(values))
    inside = (time[:, None] < length) & (channel[None, :] < channels)
    at = time[:, None] * channels + channel[None, :]
    values += tl.load(positions + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@_operation.implementation("triton")
def _triton(mel: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor) -> Tensor:
    h = F.conv1d(mel, weight1, padding=1).contiguous()
    batch, channels, frames = h.shape
    rows, block = 4, 1024
    grid = triton.cdiv(batch * channels, rows), triton.cdiv(frames, block)
    _bias_gelu_kernel[grid](
        h, bias1.contiguous(), batch * channels, channels, frames, ROWS=rows, BLOCK=block, num_warps=8
    )
    h = F.conv1d(h, weight2, stride=2, padding=1).contiguous()
    length, block = h.shape[-1], 64
    out = h.new_empty(batch, length, channels)
    tiles = triton.cdiv(length, block), triton.cdiv(channels, block), batch
    _finish_kernel[tiles](
        h, bias2.contiguous(), positions.contiguous(), out, channels, length, BLOCK=block, num_warps=8
    )
    return out


@_operation.implementation("native", lambda mel, weight1, bias1, *_: linear_misfit(mel, weight1, bias1))
def _native(mel: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor) -> Tensor:
    h = gelu(linear(_neighbours(mel.transpose(1, 2), 1), weight1.flatten(1), bias1))
    h = gelu(linear(_neighbours(h, 2), weight2.flatten(1), bias2))
    return h + positions[: h.shape[1]]


def _neighbours(h: Tensor, stride: int) -> Tensor:
    """[batch, time, channels] to [batch, time / stride, channels * 3]: the inputs of each step of a convolution."""
    return F.pad(h, (0, 0, 1, 1)).unfold(1, 3, stride).flatten(2)


@_operation.implementation("torch")
def _torch(mel: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor) -> Tensor:
    h = gelu(F.conv1d(mel, weight1, bias1, padding=1))
    h = gelu(F.conv1d(h, weight2, bias2, stride=2, padding=1))
    return h.transpose(1, 2) + positions[: h.shape[-1]]


def conv_stem(mel: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor) -> Tensor:
    """Mel frames to encoder inputs.

    mel: [batch, mel_bins, frames]; weight1: [hidden, mel_bins, 3]; weight2: [hidden, hidden, 3]; biases: [hidden];
    positions: [max_positions, hidden]. All of one dtype. Returns [batch, conv_length(frames), hidden] in it.
    Raises ValueError when shapes do not fit or there are more frames than positions.
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
    check_tensors(mel, (mel.dtype,), weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2, positions=positions)
    return _operation.on(mel.device)(mel, weight1, bias1, weight2, bias2, positions)
