"""The layers that hold a dense or packed matrix and call the matching operation: `Linear` and `Embedding`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.activation import swiglu
from ..kernels.linear import linear, linear_swiglu
from ..kernels.norm import add_rms_norm
from ..kernels.packed_weight import Packed
from .scheme import PARTS, Scheme


class _Matrix(nn.Module):
    """A weight [rows, columns]: dense in the buffer `weight`, or packed in the buffers of its scheme.

    Created empty on the meta device; the checkpoint's tensors replace the buffers.
    """

    weight: Tensor

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.scheme: Scheme | None = None
        self.register_buffer("weight", torch.empty(rows, columns, device="meta"))

    def use(self, scheme: Scheme) -> None:
        """Replace the weight by empty buffers of `scheme`. Raises SchemeError if its shape does not fit."""
        parts = scheme.stored(tuple(self.weight.shape))
        del self.weight
        self.scheme = scheme
        for name, stored in parts.items():
            self.register_buffer(name, torch.empty(stored.shape, dtype=stored.dtypes[0], device="meta"))

    @property
    def packed(self) -> Packed:
        """The packed weight. Raises AttributeError for a dense one."""
        return Packed(*(getattr(self, part) for part in PARTS if part in self._buffers))

    def prepare(self, dtype: torch.dtype) -> None:
        """Let the product precompute the data that it keeps beside the weight for x in `dtype`; see `kernels`."""
        if self.scheme is not None:
            self.scheme.prepare(self.packed, dtype)

    def _product(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        if self.scheme is not None:
            return self.scheme.linear(x, self.packed, bias, residual)
        y = linear(x, self.weight, bias)
        return y if residual is None else residual + y


class Linear(_Matrix):
    """y = x W^T + b + residual for x: [..., in_features], with a weight [out_features, in_features]."""

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool):
        super().__init__(out_features, in_features)
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, up: "Linear | None" = None) -> Tensor:
        """x: [..., in_features] and residual: [..., out_features] in the model's dtype. Returns a tensor like residual.

        up: compute silu(x W^T) * up(x), for two layers without biases, in one kernel if both have the same scheme.
        """
        if up is None:
            return self._product(x, self.bias, residual)
        if self.scheme != up.scheme:
            return swiglu(self._product(x, None), up(x))
        if self.scheme is None:
            return linear_swiglu(x, self.weight, up.weight)
        return self.scheme.swiglu(x, self.packed, up.packed)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """h = residual + x W^T, for a layer without bias. Returns (RMSNorm of h with the weight `norm`, h), both like
        residual: [..., out_features] in the model's dtype."""
        if self.scheme is None:
            return add_rms_norm(self(x), residual, norm, eps)
        return self.scheme.linear_norm(x, self.packed, residual, norm, eps)


def joined(*layers: Linear) -> Linear | None:
    """One layer that computes several layers of the same input, concatenated: [..., the sum of their out_features].

    Their weights and biases become views of the new layer's. Returns None, without changes, if their formats differ.
    """
    first = layers[0]
    stored = [dict(layer.named_buffers(recurse=False, remove_duplicate=False)) for layer in layers]
    if any(layer.scheme != first.scheme for layer in layers) or len({frozenset(parts) for parts in stored}) > 1:
        return None
    whole = Linear(0, 0, bias=first.bias is not None)
    whole.scheme = first.scheme
    whole._buffers = dict.fromkeys(first._buffers)
    for name in stored[0]:
        tensor = torch.cat([parts[name] for parts in stored])
        whole.register_buffer(name, tensor)
        for layer, part in zip(layers, tensor.split([len(parts[name]) for parts in stored]), strict=True):
            layer.register_buffer(name, part)
    return whole


class Embedding(_Matrix):
    """A table of vectors [rows, channels], also the weight of the product with its transpose."""

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The vectors of ids: [...] int64 to [..., channels] in `dtype`; only these rows are unpacked."""
        if self.scheme is None:
            return F.embedding(ids, self.weight)
        return self.scheme.dequantize(self.packed.rows(ids.flatten()), dtype).unflatten(0, ids.shape)

    def scores(self, x: Tensor) -> Tensor:
        """x W^T for x: [..., channels], the head of models with tied embeddings."""
        return self._product(x, None)
