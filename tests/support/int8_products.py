"""Random int8 weights, and plain products to compare with."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from afnext.kernels.packed_product import FEW_ROWS
from afnext.kernels.packed_weight import Packed
from afnext.kernels.quantize_rows import reference


def weights(columns: int, inner: int, device: torch.device) -> Packed:
    codes = torch.randint(-127, 128, (columns, inner), dtype=torch.int8)
    return Packed(codes.to(device), (torch.rand(columns) / 127 / inner**0.5).to(device))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, one product added after the other in float32: libraries sum in an order that GPUs do not."""
    y = torch.zeros(len(x), len(weight), device=x.device)
    for k in range(x.shape[1]):
        y += x[:, k, None].float() * weight[:, k].float()
    return y.to(x.dtype)


def dense(weight: Packed, dtype: torch.dtype) -> Tensor:
    return (weight.codes.float() * weight.scales[:, None]).to(dtype)


def rounds_inputs(backend: str, rows: int) -> bool:
    """Whether the schemes with int8 activations round them: Triton's kernels for few rows do not."""
    return backend != "triton" or rows > FEW_ROWS


def spare_the_interpreter(backend: str, groups: int, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the product of many groups of activations round them by the reference where Triton's kernels are interpreted.

    They round one group per program, which the interpreter takes 5 ms for; fewer ones go through both kernels.
    """
    if backend == "triton" and groups > 250:
        monkeypatch.setattr(module, "quantize_rows", reference)
