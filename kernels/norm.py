"""LayerNorm and RMSNorm over the last dimension, alone or after adding to the residual stream.

    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    rms_norm(x)   = x / sqrt(mean(x^2) + eps) * weight
    add_*_norm(x, residual): h = residual + x; returns (norm(h), h)

Statistics are float32 whatever the dtype. The pair "add, then norm" is one operation because both are memory-bound:
fused it reads 2 and writes 2 elements per channel, apart it reads 3 and writes 2.
Source: Ba et al. 2016 (LayerNorm); Zhang & Sennrich 2019 (RMSNorm).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import Operation


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The specification of `layer_norm`, in float64."""
    wide = x.double()
    centered = wide - wide.mean(-1, keepdim=True)
    normed = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.double() + bias.double()).to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of `rms_norm`, in float64."""
    wide = x.double()
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The specification of `add_layer_norm`: the sum is rounded to the dtype of the stream before it is normed."""
    hidden = residual + x
    return layer_norm_reference(hidden, weight, bias, eps), hidden


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification of `add_rms_norm`: the sum is rounded to the dtype of the stream before it is normed."""
    hidden = residual + x
    return rms_norm_reference(hidden, weight, eps), hidden


_layer_norm = Operation("layer_norm", layer_norm_reference)
_rms_norm = Operation("rms_norm", rms_norm_reference)
_add_layer_norm = Operation("add_layer_norm", add_layer_norm_reference)
_add_rms_norm = Operation("add_rms_norm", add_rms_norm_reference)


@_layer_norm.implementation("torch")
def _layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@_rms_norm.implementation("torch")
def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@_add_layer_norm.implementation("torch")
def _add_layer_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden = residual + x
    return _layer_norm_torch(hidden, weight, bias, eps), hidden


@_add_rms_norm.implementation("torch")
def _add_rms_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    hidden = residual + x
    return _rms_norm_torch(hidden, weight, eps), hidden


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension. x: [..., channels]; weight, bias: [channels]. Returns like x.

    Raises ValueError when shapes do not fit, as all norms do.
    """
    _check(x, weight, bias)
    return _layer_norm.on(x.device)(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension. x: [..., channels]; weight: [channels]. Returns like x."""
    _check(x, weight)
    return _rms_norm.on(x.device)(x, weight, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and LayerNorm the sum. Returns (normed, sum), both like x."""
    _check(x, weight, bias, residual=residual)
    return _add_layer_norm.on(x.device)(x, residual, weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and RMSNorm the sum. Returns (normed, sum), both like x."""
    _check(x, weight, residual=residual)
    return _add_rms_norm.on(x.device)(x, residual, weight, eps)


def _check(x: Tensor, *parameters: Tensor, residual: Tensor | None = None) -> None:
    if any(parameter.shape != x.shape[-1:] for parameter in parameters):
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in parameters)
        raise ValueError(f"weight and bias must have the shape of the last dimension of {tuple(x.shape)}, got {shapes}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"the residual's shape {tuple(residual.shape)} must be that of x, {tuple(x.shape)}")
