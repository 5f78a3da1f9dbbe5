"""The linear layer of every floor above: holds its weight and calls the product that fits it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """y = x W^T + b for x: [..., in_features], with a dense weight [out_features, in_features].

    Created empty on the meta device; the checkpoint's tensors take the place of the buffers.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool):
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] in the weight's dtype. Returns [..., out_features]."""
        return F.linear(x, self.weight, self.bias)
