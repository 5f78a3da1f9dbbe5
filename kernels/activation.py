"""Activations: exact GELU, and SwiGLU's gated product.

    gelu(x)          = x / 2 * (1 + erf(x / sqrt(2)))
    swiglu(gate, up) = gate / (1 + exp(-gate)) * up

Memory-bound: gelu reads and writes each element once, swiglu reads two and writes one.
Source: Hendrycks & Gimpel 2016 (GELU); Shazeer 2020, "GLU Variants Improve Transformer" (SwiGLU).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import Operation


def gelu_reference(x: Tensor) -> Tensor:
    """The specification of `gelu`, in float64."""
    wide = x.double()
    return (0.5 * wide * (1 + torch.erf(wide * 0.5**0.5))).to(x.dtype)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of `swiglu`, in float64."""
    wide = gate.double()
    return (wide / (1 + torch.exp(-wide)) * up.double()).to(gate.dtype)


_gelu = Operation("gelu", gelu_reference)
_swiglu = Operation("swiglu", swiglu_reference)


@_gelu.implementation("torch")
def _gelu_torch(x: Tensor) -> Tensor:
    return F.gelu(x)


@_swiglu.implementation("torch")
def _swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """Exact GELU of x, elementwise; any shape and floating dtype, returned alike."""
    return _gelu.on(x.device)(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. gate, up: same shape and dtype, returned alike. Raises ValueError otherwise."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu takes two tensors alike, got {gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}"
        )
    return _swiglu.on(gate.device)(gate, up)
