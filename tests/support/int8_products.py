"""Random int8 weights, and plain products to compare with."""

import torch
from torch import Tensor


def weights(columns: int, inner: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-127, 128, (columns, inner), dtype=torch.int8)
    return codes.to(device), (torch.rand(columns) / 127 / inner**0.5).to(device)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, one product added after the other in float32: libraries sum in an order that GPUs do not."""
    y = torch.zeros(len(x), len(weight), device=x.device)
    for k in range(x.shape[1]):
        y += x[:, k, None].float() * weight[:, k].float()
    return y.to(x.dtype)


def dense(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scales[:, None]).to(dtype)
