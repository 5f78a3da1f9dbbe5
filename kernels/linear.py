"""Product with a dense weight, alone or as a SwiGLU pair.

    y = x W^T + b
    y = silu(x G^T) * (x U^T)

FLOPs: 2 * rows * in * out per weight. Bytes: out * in elements of each weight, which limit the speed for few rows, and
x and y.

torch computes dense products (cuBLAS, oneDNN, MKL), except where it is slow. On a CPU without instructions for
bfloat16 (before Cooper Lake and Zen 4, and most of Intel's client CPUs) torch multiplies bfloat16 and float16 at a
seventh of the speed of float32; where the instructions are slow (Emerald Rapids without AMX), at half of it. On such
CPUs the native kernels multiply in float32: for many rows they widen the weights a panel at a time in the L1 cache
(`native/panels.h`), for up to 16 rows as they read them (`native/linear_dense.cpp`). With AVX512-BF16 the native
kernels multiply bfloat16 in two cases: up to four rows, where they read the weights at 34 to 43 GB/s and torch at 30
(two cores of a Zen 5 EPYC), and a pair with many rows, which they multiply as fast as torch without writing gate and
up to memory. On ARM they multiply bfloat16 at every level but the portable one, because torch multiplies it fast only
if it was built with Arm's Compute Library. Where rows must not depend on each other (`row_groups.py`), the native
kernels run on CPUs, and the W8A16 kernel, with unscaled weights, on GPUs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import activation, native
from .arguments import FLOATING, check_tensors
from .dispatch import Operation, forced_backend
from .few_rows import few_rows_in_tiles
from .linear_int8 import dense_triton
from .native import products
from .row_groups import any_rows, is_row_invariant
from .strides import as_rows


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The specification, in float64."""
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def linear_swiglu_reference(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The specification of `linear_swiglu`, in float64."""
    wide = x.double()
    return activation.swiglu_reference(reference(wide, gate, None), reference(wide, up, None)).to(x.dtype)


_operation = Operation("linear", reference, rows=(0,))
_swiglu = Operation("linear_swiglu", linear_swiglu_reference, rows=(0,))


def linear_misfit(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why torch computes a product on a CPU, or None.

    If forced, or if rows must not depend on each other, the native kernels multiply every dtype at every level.
    """
    if forced_backend("linear") is None and not is_row_invariant():
        if x.dtype == torch.float32:
            return "float32, which torch multiplies as fast"
        if not products.has_panels() or (products.multiplies_bfloat16() and not _multiplies_faster(x)):
            return f"dense weights at the level {native.isa()}"
    return native.misfit(x, weight, bias)


def _multiplies_faster(x: Tensor) -> bool:
    """Whether the native kernels multiply bfloat16 instead of torch, at a level with instructions for it."""
    few = x.shape[:-1].numel() <= 4
    return x.dtype == torch.bfloat16 and (native.isa() == "i8mm" or (native.isa() == "avx512" and few))


@_operation.implementation("native", linear_misfit, few_rows_in_tiles)
def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return products.dense_product(as_rows(x), weight.contiguous(), None, bias).view(*x.shape[:-1], len(weight))


def _swiglu_misfit(x: Tensor, gate: Tensor, up: Tensor) -> str | None:
    # As fast as torch's products, and gate and up are not written to memory.
    if native.isa() == "avx512" and products.in_panels(as_rows(x), len(gate)):
        return native.misfit(x, gate, up)
    return linear_misfit(x, gate, up)


@_swiglu.implementation("native", _swiglu_misfit, few_rows_in_tiles)
def _swiglu_native(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    y = products.dense_product(as_rows(x), gate.contiguous(), up.contiguous(), None)
    return y.view(*x.shape[:-1], len(gate))


@_operation.implementation("triton", groups=any_rows)
def _triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if is_row_invariant():  # cuBLAS is not: it chooses a kernel by the number of rows
        return dense_triton(x, weight.contiguous(), bias)
    return F.linear(x, weight, bias)


@_operation.implementation("torch")
def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


@_swiglu.implementation("triton", groups=any_rows)
def _swiglu_triton(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return activation.swiglu(_triton(x, gate, None), _triton(x, up, None))


@_swiglu.implementation("torch")
def _swiglu_torch(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return activation.swiglu(F.linear(x, gate), F.linear(x, up))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x: [..., in], weight: [out, in] and bias: [out], all of one floating dtype.

    Returns [..., out] in that dtype, sums in float32. Raises ValueError when shapes or dtypes do not fit.
    """
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear takes a bias [out], got {tuple(bias.shape)} with a weight {tuple(weight.shape)}")
    check_tensors(x, FLOATING, x=x, weight=weight, bias=bias)
    _check(x, weight, *(() if bias is None else (bias,)))
    return _operation.on(x.device)(x, weight, bias)


def linear_swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x G^T) * (x U^T) for x: [..., in] and gate, up: [out, in], all of one floating dtype.

    Returns [..., out] in that dtype. Sums are float32; where one kernel computes both products, gate and up are, too.
    Raises ValueError when shapes or dtypes do not fit.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    check_tensors(x, FLOATING, x=x, gate=gate, up=up)
    _check(x, gate, up)
    return _swiglu.on(x.device)(x, gate, up)


def _check(x: Tensor, weight: Tensor, *others: Tensor) -> None:
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"linear takes [..., in] and [out, in], got {tuple(x.shape)} and {tuple(weight.shape)}")
    dtypes = {tensor.dtype for tensor in (x, weight, *others)}
    if len(dtypes) > 1:
        raise ValueError(f"linear takes tensors of one dtype, got {', '.join(sorted(map(str, dtypes)))}")
