"""Activations: exact GELU, and SwiGLU's gated product.

    gelu(x)          = x / 2 * (1 + erf(x / sqrt(2)))
    swiglu(gate, up) = gate / (1 + exp(-gate)) * up

Memory-bound: gelu reads and writes each element once; swiglu reads two elements and writes one. The Triton and the
native kernels do the same, with some 30 FLOPs per element in float32. A bias before GELU belongs to the preceding
product, whose library adds it at no cost; where no library does, `conv_stem` fuses the two.
Source: Hendrycks & Gimpel 2016 (GELU); Shazeer 2020, "GLU Variants Improve Transformer" (SwiGLU).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import native
from .arguments import FLOATING, check_tensors
from .dispatch import Operation, on_cpu
from .row_groups import any_rows
from .strides import strided_rows
from .triton_language import tl, triton

_BLOCK = 1024  # elements per program: 16 bytes of bf16 per thread with 4 warps, on every GPU


def gelu_reference(x: Tensor) -> Tensor:
    """The specification of `gelu`, in float64."""
    wide = x.double()
    return (0.5 * wide * (1 + torch.erf(wide * 0.5**0.5))).to(x.dtype)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of `swiglu`, in float64."""
    wide = gate.double()
    return (wide / (1 + torch.exp(-wide)) * up.double()).to(gate.dtype)


_gelu = Operation("gelu", gelu_reference)
_swiglu = Operation("swiglu", swiglu_reference, rows=(0, 1))


@triton.jit
def exact_gelu(x):  # type: ignore[no-untyped-def]
    """GELU of a float32 block."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_kernel(x, out, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    values = exact_gelu(tl.load(x + i, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + i, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_kernel(gate, up, out, gate_row, up_row, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gates = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    values = tl.div_rn(gates, 1.0 + tl.exp(-gates)) * ups  # the approximate division is too coarse for float32
    tl.store(out + row * columns + column, values.to(out.dtype.element_ty), mask=inside)


@_gelu.implementation("triton")
def _gelu_triton(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _gelu_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, out, x.numel(), BLOCK=_BLOCK, num_warps=4)
    return out


@_swiglu.implementation("triton", groups=any_rows)
def _swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    gates, ups = strided_rows(gate), strided_rows(up)
    rows, columns = gates.shape
    grid = (rows * triton.cdiv(columns, _BLOCK),)
    _swiglu_kernel[grid](gates, ups, out, gates.stride(0), ups.stride(0), columns, BLOCK=_BLOCK, num_warps=4)
    return out


@_gelu.implementation("native", native.misfit)
def _gelu_native(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    native.call("gelu", x, out, x.numel(), x.dtype)
    return out


@_swiglu.implementation("native", native.misfit, any_rows)
def _swiglu_native(gate: Tensor, up: Tensor) -> Tensor:
    out, gate, up = gate.new_empty(gate.shape), strided_rows(gate), strided_rows(up)
    native.call("swiglu", gate, up, out, *gate.shape, gate.stride(0), up.stride(0), out.dtype)
    return out


@_gelu.implementation("torch")
def _gelu_torch(x: Tensor) -> Tensor:
    if x.dtype == torch.float32 and on_cpu(x):  # with AVX2, the error of F.gelu near zero exceeds rounding
        return torch.erf(x * 0.5**0.5).add_(1).mul_(x).mul_(0.5)
    return F.gelu(x)


@_swiglu.implementation("torch")
def _swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """Exact GELU of x, elementwise; any shape and floating dtype. Returns a tensor like x."""
    check_tensors(x, FLOATING, x=x)
    return _gelu.on(x.device)(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. gate, up: same shape and dtype, as is the result. Raises ValueError otherwise."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu takes two tensors alike, got {gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}"
        )
    check_tensors(gate, FLOATING, gate=gate, up=up)
    return _swiglu.on(gate.device)(gate, up)
