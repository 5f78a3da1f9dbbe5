"""Product with a dense weight.

    y = x W^T + b

Operations: 2 * rows * in * out. Bytes: out * in of the weight, which bound a few rows, and x and y.

Dense products go to torch (cuBLAS, oneDNN, MKL), except where it has none. On a CPU without instructions for bfloat16
(before Cooper Lake and Zen 4, and most of Intel's client CPUs) it multiplies bfloat16 and float16 at a seventh of the
speed of float32. There the native kernels multiply, in float32: of many rows the weights are widened a panel at a time
in the first-level cache (`native/panels.h`), of up to 16 rows as they are read (`native/linear_dense.cpp`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import native
from .dispatch import Operation, forced_backend
from .native import products
from .strides import as_rows


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The specification, in float64."""
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


_operation = Operation("linear", reference)


def linear_misfit(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why a product goes to torch on a CPU, or None. Forced, the native kernels multiply every dtype at every level."""
    if forced_backend() is None:
        if x.dtype == torch.float32:
            return "float32, which torch multiplies as fast"
        if products.multiplies_bfloat16() or not products.has_panels():
            return f"dense weights at the level {native.isa()}"
    return native.misfit(x, weight, bias)


@_operation.implementation("native", linear_misfit)
def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return products.dense_product(as_rows(x), weight.contiguous(), bias).view(*x.shape[:-1], len(weight))


@_operation.implementation("triton")
@_operation.implementation("torch")
def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x: [..., in], weight: [out, in] and bias: [out], all of one floating dtype.

    Returns [..., out] in that dtype, sums in float32. Raises ValueError when shapes or dtypes do not fit.
    """
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"linear takes [..., in], [out, in] and [out], got {shapes}")
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"linear takes tensors of one dtype, got {', '.join(str(tensor.dtype) for tensor in tensors)}")
    return _operation.on(x.device)(x, weight, bias)
