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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import FLOATING, check_tensors
from .dispatch import Operation, forced_backend
from .linear_fp8 import linear_fp8, linear_fp8_reference, readable
from .linear_int3 import check_int3, linear_int3, linear_int3_reference, w3a16_triton
from .linear_int4 import check_int4, linear_int4, linear_int4_reference, w4a16_triton
from .linear_int8 import check_weight, linear_int8, linear_int8_reference, w8a16_triton
from .linear_int8_groups import check_int8_groups, groups_triton, linear_int8_groups, linear_int8_groups_reference
from .linear_nf4 import check_nf4, codebook, linear_nf4, linear_nf4_reference
from .linear_w4a8 import linear_w4a8, linear_w4a8_reference
from .linear_w8a8 import linear_w8a8, linear_w8a8_reference
from .norm import add_rms_norm, add_rms_norm_reference
from .packed_product import AddNorm, check_epilogue
from .quantize_rows import E4M3

_NO_PAIR = (None, None, None)


@dataclass(frozen=True)
class Product:
    """A format of packed weights. parts: tensors of a weight, 3 with zeros; linear, reference: x W^T; check: raises
    ValueError unless x and the weight fit; few_rows: runs the Triton kernel of few rows, which ends with the norm."""

    parts: int
    linear: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    check: Callable[..., object]
    few_rows: Callable[[Tensor, Any, AddNorm], Tensor]

    def weight(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor | None, ...]:
        """The tensors of a weight, as the functions take them."""
        return (codes, scales, zeros)[: self.parts]


def _few_int8(x: Tensor, weight: Any, norm: AddNorm) -> Tensor:
    return w8a16_triton(x, weight, (None, None), None, None, norm=norm)


def _few_fp8(x: Tensor, weight: Any, norm: AddNorm) -> Tensor:
    codes, scales = weight
    return w8a16_triton(x, (readable(codes), scales), (None, None), None, None, owner=codes, norm=norm)


def _check_fp8(x: Tensor, weight: Tensor, scales: Tensor) -> None:
    check_weight(x, weight, scales, E4M3)


def _few_int8_groups(x: Tensor, weight: Any, norm: AddNorm) -> Tensor:
    return groups_triton(x, weight, _NO_PAIR, None, None, norm)


def _few_int4(x: Tensor, weight: Any, norm: AddNorm) -> Tensor:
    return w4a16_triton(x, weight, _NO_PAIR, None, None, None, norm)


def _few_int3(x: Tensor, weight: Any, norm: AddNorm) -> Tensor:
    return w3a16_triton(x, weight, (None, None), None, None, norm)


def _few_nf4(x: Tensor, weight: Any, norm: AddNorm) -> Tensor:
    codes, scales = weight
    return w4a16_triton(x, (codes, scales.contiguous(), None), _NO_PAIR, None, None, codebook(x.device), norm)


PRODUCTS = {
    "linear_int8": Product(2, linear_int8, linear_int8_reference, check_weight, _few_int8),
    "linear_w8a8": Product(2, linear_w8a8, linear_w8a8_reference, check_weight, _few_int8),
    "linear_fp8": Product(2, linear_fp8, linear_fp8_reference, _check_fp8, _few_fp8),
    "linear_int8_groups": Product(
        3, linear_int8_groups, linear_int8_groups_reference, check_int8_groups, _few_int8_groups
    ),
    "linear_int4": Product(3, linear_int4, linear_int4_reference, check_int4, _few_int4),
    "linear_w4a8": Product(3, linear_w4a8, linear_w4a8_reference, check_int4, _few_int4),
    "linear_int3": Product(2, linear_int3, linear_int3_reference, check_int3, _few_int3),
    "linear_nf4": Product(2, linear_nf4, linear_nf4_reference, check_nf4, _few_nf4),
}


def linear_norm_reference(
    product: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The specification of `linear_norm`, in float64 except that the product and the sum are rounded to the dtype of
    x."""
    chosen = PRODUCTS[product]
    y = chosen.reference(x, *chosen.weight(codes, scales, zeros), None, None)
    return add_rms_norm_reference(y, residual, norm, eps)


_operation = Operation("linear_norm", linear_norm_reference)


@_operation.implementation("native")
@_operation.implementation("torch")
def _separate(
    product: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    chosen = PRODUCTS[product]
    return add_rms_norm(chosen.linear(x, *chosen.weight(codes, scales, zeros)), residual, norm, eps)


@_operation.implementation("triton")
def _triton(
    product: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    forced = {forced_backend(operation) for operation in (product, "add_rms_norm")}
    if not AddNorm.covers(x, len(norm)) or not forced <= {None, "triton"} or x.numel() == 0:
        return _separate(product, x, codes, scales, zeros, residual, norm, eps)
    chosen = PRODUCTS[product]
    normed = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    end = AddNorm(residual, norm.contiguous(), eps, normed)
    hidden = chosen.few_rows(x, chosen.weight(codes, scales, zeros), end)
    return normed, hidden


def linear_norm(
    product: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add x W^T to the residual stream and RMSNorm the sum. Returns (normed, sum), both like residual.

    product: a key of `PRODUCTS`, the operation that multiplies x: [..., in] by such weights; codes, scales, zeros: the
    weight, as that operation takes it; residual: [..., out] in the dtype of x; norm: [out], the norm's weight.
    Raises ValueError when shapes or dtypes do not fit.
    """
    chosen = PRODUCTS[product]
    if zeros is not None and chosen.parts < 3:
        raise ValueError(f"{product} takes weights without zeros")
    chosen.check(x, *chosen.weight(codes, scales, zeros))
    check_epilogue(x, len(codes), None, residual)
    check_tensors(x, FLOATING, norm=norm)
    if norm.shape != codes.shape[:1]:
        raise ValueError(f"the norm's weight must be [{len(codes)}], got {tuple(norm.shape)}")
    return _operation.on(x.device)(product, x, codes, scales, zeros, residual, norm, eps)
