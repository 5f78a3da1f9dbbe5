"""What follows the encoder's layers: average pooling by two, LayerNorm, and rotary time embedding (RoTE).

    pooled[t] = (x[2t] + x[2t + 1]) / 2
    normed    = LayerNorm(pooled)
    out       = normed with channel pair (2i, 2i + 1) turned by angle[w, t, i], channels beyond 2 * dim unchanged

The angles, as the released checkpoints apply them, depend on the window's index w in its audio and the frame t in it:

    f[j]   = theta ** (-2 j / dim)                       j = 0 .. dim/2 - 1
    axis1  = w / theta * f[j]        each value twice    pairs 0 .. dim/2 - 1 of the first dim channels
    axis2  = t / theta * 2 pi * f[j] each value twice    the next dim channels
    tau    = w * frames * frame_seconds + t * frame_seconds                absolute seconds
    angle  = concat(axis1, axis2) * (-tau * 2 pi)

They reach 4e4 rad at the end of 30 minutes, where a float32 step is 0.004 rad: the products above are float32 in just
this order, because another order gives visibly other angles. cos and sin must be accurate to full float32 precision.

One window at full size reads 1500 * 1280 and writes 750 * 1280 elements; pooling, norm and rotation apart would read
and write another 4 * 750 * 1280.
Source: Goel et al. 2024, arXiv:2410.12109, in the axial form of the released checkpoints.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import Operation
from .norm import layer_norm_reference
from .rotary import rope_frequencies


def pooled_length(positions: int) -> int:
    """Number of tokens after pooling `positions` encoder positions by two; 0 for fewer than two."""
    return max(0, (positions - 2) // 2 + 1)


@dataclass(frozen=True)
class TimeEmbedding:
    """The parameters of RoTE. theta: base and maximum position; dim: rotary width of each axis, in channels;
    frames: tokens in a full window; frame_seconds: duration of one token."""

    theta: float
    dim: int
    frames: int
    frame_seconds: float

    def angles(self, windows: Tensor, length: int) -> Tensor:
        """Angles of the first `length` frames of each window: [batch, length, dim] float32.

        windows: [batch] int64, the index of each window in its own audio.
        """
        device = windows.device
        f = rope_frequencies(self.dim, self.theta, device)
        t = torch.arange(length, dtype=torch.float32, device=device)
        axis1 = (windows.float() / self.theta)[:, None] * f
        axis2 = (t / self.theta * (2 * math.pi))[:, None] * f
        tau = (windows * self.frames)[:, None] * self.frame_seconds + t * self.frame_seconds
        both = torch.cat(torch.broadcast_tensors(axis1[:, None], axis2[None]), dim=-1)
        return both * (-tau * 2 * math.pi)[..., None]


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, angles: Tensor | None) -> Tensor:
    """The specification: float64 from the float32 angles on."""
    length = pooled_length(x.shape[1])
    wide = x.double()
    pooled = (wide[:, 0 : 2 * length : 2] + wide[:, 1 : 2 * length : 2]) / 2
    out = layer_norm_reference(pooled, weight, bias, eps)
    if angles is not None:
        width = 2 * angles.shape[-1]
        a, b = out[..., 0:width:2].clone(), out[..., 1:width:2].clone()
        cos, sin = angles.double().cos(), angles.double().sin()
        out[..., 0:width:2] = a * cos - b * sin
        out[..., 1:width:2] = b * cos + a * sin
    return out.to(x.dtype)


_operation = Operation("pool_norm_rotate", reference)


@_operation.implementation("torch")
def _torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, angles: Tensor | None) -> Tensor:
    length = pooled_length(x.shape[1])
    pooled = x[:, : 2 * length].float().unflatten(1, (length, 2)).mean(2)
    out = F.layer_norm(pooled, weight.shape, weight.float(), bias.float(), eps)
    if angles is not None:
        pairs = out[..., : 2 * angles.shape[-1]].unflatten(-1, (-1, 2))
        a, b = pairs.unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        pairs.copy_(torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1))
    return out.to(x.dtype)


def pool_norm_rotate(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, angles: Tensor | None = None
) -> Tensor:
    """Average pool by two over time, LayerNorm, then RoTE.

    x: [batch, positions, channels]; weight, bias: [channels]; angles: [batch, pooled_length(positions), dim] float32
    radians with 2 * dim <= channels, or None for models without RoTE (Audio Flamingo 3).
    Returns [batch, pooled_length(positions), channels] in the dtype of x; pooling, norm and rotation are float32.
    Raises ValueError when shapes do not fit.
    """
    if x.ndim != 3 or x.shape[1] < 2 or not weight.shape == bias.shape == x.shape[-1:]:
        raise ValueError(
            "expected x [batch, at least 2 positions, channels], weight and bias [channels], got "
            f"{tuple(x.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    length = pooled_length(x.shape[1])
    if angles is not None and (angles.shape[:2] != (x.shape[0], length) or 2 * angles.shape[-1] > x.shape[-1]):
        raise ValueError(f"angles {tuple(angles.shape)} do not fit {tuple(x.shape)} pooled to {length} tokens")
    return _operation.on(x.device)(x, weight, bias, eps, angles)
