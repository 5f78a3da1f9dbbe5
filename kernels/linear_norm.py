"""A product with a packed weight, added to the residual stream, and the RMSNorm of the sum.

    h[m] = residual[m] + x[m] W^T          rms_norm(h[m]) = h[m] / sqrt(mean(h[m]^2) + eps) * norm[n]

Products of any format (`PRODUCTS`) and norms follow each other in every layer of the decoder. This is `add_rms_norm`
of the product, bit for bit: the product is rounded to the dtype of x before the residual is added.

Triton: one launch for up to `NORMED_ROWS` rows of at most 4096 outputs, in which the block that finishes last
normalizes the rows (`packed_product.AddNorm`). It reads and writes rows * out elements in the L2 cache, as a separate
launch would, and saves the time between two launches. The next product could normalize its inputs instead, but each of
its blocks would have to normalize all of them again. For more rows, which would wait for each other in one block, and
on other devices, the norm is a separate call.
FLOPs and bytes: those of the product and of `add_rms_norm`.
"""

import torch
from torch import Tensor

from .arguments import FLOATING, check_tensors
from .dispatch import Operation, forced_backend
from .linear_fp8 import FP8
from .linear_int3 import INT3
from .linear_int4 import INT4
from .linear_int8 import INT8
from .linear_int8_groups import INT8_GROUPS
from .linear_nf4 import NF4
from .linear_nvfp4 import NVFP4
from .linear_w4a8 import W4A8
from .linear_w8a8 import W8A8
from .norm import add_rms_norm, add_rms_norm_reference
from .packed_product import AddNorm, check_epilogue
from .packed_weight import Packed

_FORMATS = (INT8, W8A8, FP8, INT8_GROUPS, INT4, W4A8, INT3, NF4, NVFP4)
PRODUCTS = {product.single.name: product for product in _FORMATS}
"""The formats of packed weights, by the names of their products."""


def linear_norm_reference(
    product: str, x: Tensor, weight: Packed, residual: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The specification of `linear_norm`, in float64 except that the product and the sum are rounded to the dtype of
    x."""
    y = PRODUCTS[product].single.implementations["reference"](x, weight, None, None)
    return add_rms_norm_reference(y, residual, norm, eps)


_operation = Operation("linear_norm", linear_norm_reference)


@_operation.implementation("native")
@_operation.implementation("torch")
def _separate(
    product: str, x: Tensor, weight: Packed, residual: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return add_rms_norm(PRODUCTS[product].linear(x, weight, None, None), residual, norm, eps)


@_operation.implementation("triton")
def _triton(
    product: str, x: Tensor, weight: Packed, residual: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    forced = {forced_backend(operation) for operation in (product, "add_rms_norm")}
    if not AddNorm.covers(x, len(norm)) or not forced <= {None, "triton"} or x.numel() == 0:
        return _separate(product, x, weight, residual, norm, eps)
    normed = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    end = AddNorm(residual, norm.contiguous(), eps, normed)
    hidden = PRODUCTS[product].few_rows(x, weight, None, None, None, norm=end)
    return normed, hidden


def linear_norm(
    product: str, x: Tensor, weight: Packed, residual: Tensor, norm: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add x W^T to the residual stream and RMSNorm the sum. Returns (normed, sum), both like residual.

    product: a key of `PRODUCTS`, the operation that multiplies x: [..., in] by such weights; residual: [..., out] in
    the dtype of x; norm: [out], the norm's weight. Raises ValueError when shapes or dtypes do not fit.
    """
    PRODUCTS[product].check(x, weight)
    columns = len(weight.codes)
    check_epilogue(x, columns, None, residual)
    check_tensors(x, FLOATING, norm=norm)
    if norm.shape != (columns,):
        raise ValueError(f"the norm's weight must be [{columns}], got {tuple(norm.shape)}")
    return _operation.on(x.device)(product, x, weight, residual, norm, eps)
