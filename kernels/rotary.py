"""Rotary position embedding with float positions, in either pairing.

    angle[t, j] = position[t] * f[j]                                  f[j] = theta ** (-2 j / dim), j = 0 .. dim/2 - 1
    half:         (x[j], x[j + dim/2])  turned by angle[t, j]         Qwen2's pairing
    interleaved:  (x[2j], x[2j + 1])    turned by angle[t, j]         RoTE's pairing

where turning (a, b) by phi gives (a cos phi - b sin phi, b cos phi + a sin phi). Positions are floats, so the index of
a token (RoPE) and its time (the report's RoTE: position = -2 pi * seconds) are the same operation. Channels beyond
2 * len(f) pass through. Angles are formed in float32 by that one product, as the reference model does.

Memory-bound: each element is read and written once.
Source: Su et al. 2021 (RoPE); Goel et al. 2024, arXiv:2410.12109 (RoTE).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .dispatch import Operation

Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rotation:
    """Where each token stands and how fast each channel pair turns; made once per forward pass for all layers.

    positions: [batch, time] float32; frequencies: [pairs] float32, radians per unit of position.
    """

    positions: Tensor
    frequencies: Tensor
    pairing: Pairing = "half"

    @cached_property
    def angles(self) -> Tensor:
        """[batch, time, pairs] float32, in radians."""
        return self.positions.float()[..., None] * self.frequencies

    @cached_property
    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles, each [batch, time, 1, pairs] float32, to broadcast over heads."""
        angles = self.angles[..., None, :]
        return angles.cos(), angles.sin()


def rope_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """f[j] = theta ** (-2 j / dim) for j < dim / 2, float32."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return (1.0 / theta**exponents).to(device)


def reference(x: Tensor, rotation: Rotation) -> Tensor:
    """The specification: float64 from the float32 angles on, pairs gathered by index."""
    pairs = rotation.frequencies.numel()
    j = torch.arange(pairs, device=x.device)
    first, second = (j, j + pairs) if rotation.pairing == "half" else (2 * j, 2 * j + 1)
    angles = rotation.angles.double()[..., None, :]
    a, b = x[..., first].double(), x[..., second].double()
    out = x.double().clone()
    out[..., first] = a * angles.cos() - b * angles.sin()
    out[..., second] = b * angles.cos() + a * angles.sin()
    return out.to(x.dtype)


_operation = Operation("rotary", reference)


@_operation.implementation("torch")
def _torch(x: Tensor, rotation: Rotation) -> Tensor:
    cos, sin = rotation.cos_sin
    pairs = cos.shape[-1]
    if rotation.pairing == "half":
        first, second = slice(pairs), slice(pairs, 2 * pairs)
    else:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    a, b = x[..., first], x[..., second]
    out = torch.empty_like(x)
    out[..., 2 * pairs :] = x[..., 2 * pairs :]
    # cos and sin are float32, so the products are, too; the sum is rounded once, on its way into `out`.
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


def rotary(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every head of x by its token's position.

    x: [batch, time, heads, head_dim] of any floating dtype, returned alike; the maths is float32.
    Raises ValueError when the rotation does not fit x.
    """
    check_rotation(x, rotation)
    return _operation.on(x.device)(x, rotation)


def check_rotation(x: Tensor, rotation: Rotation) -> None:
    """Raise ValueError unless `rotation` fits x: [batch, time, heads, head_dim]."""
    if x.ndim != 4 or rotation.positions.shape != x.shape[:2] or 2 * rotation.frequencies.numel() > x.shape[-1]:
        raise ValueError(
            f"positions {tuple(rotation.positions.shape)} with {rotation.frequencies.numel()} pairs cannot rotate a "
            f"tensor of shape {tuple(x.shape)}; expected [batch, time, heads, head_dim]"
        )
