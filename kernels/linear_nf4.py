"""Linear layers with nf4 weights: 16 levels, one scale for each 64 neighbouring inputs of a channel (W4A16), alone or
as a SwiGLU pair.

    y[m, n] = sum_k x[m, k] * scales[n, k // 64] * LEVELS[code[n, k]] + bias[n] + residual[m, n]
    SwiGLU: y = silu(gate(x)) * up(x), two such products of one x

x: [rows, in] float16, bfloat16 or float32; codes: [out, in / 2] uint8, the even input in a byte's HIGH four bits;
scales: [out, in / 64] float32; the layout of bitsandbytes. The format is here for weights that exist in it; int4 in
groups is smaller and as exact.

The native kernels read out * in * (1/2 + 1/16) bytes once for up to 16 rows: levels come from registers, 16 or, as
bfloat16, 32 at a time, and are scaled after they are summed. More rows go past weights unpacked in panels, where the
level has them, and otherwise, as on torch, in tiles of channels made dense, which write and read out * in * 2 bytes
more.

On GPUs the kernel is int4's, as bound and as split. Only a code becomes a number differently: the lanes of a warp hold
the levels, and a shuffle fetches one for each weight, which a multiprocessor does for 32 weights a cycle.

Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

from functools import cache

import torch
from torch import Tensor

from . import activation, native
from .dispatch import Operation
from .linear_int4 import w4a16_triton
from .linear_int8 import FEW_CPU_ROWS, add_epilogue, check_epilogue, product_by_tiles
from .native import products
from .strides import as_rows

BLOCK_SIZE = 64
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def unpacked(codes: Tensor, scales: Tensor) -> Tensor:
    """The weights [out, in], in float32, or float64 if the scales are."""
    levels = _levels(codes.device).to(scales.dtype)
    # Row b: the two levels of the byte b. One lookup a byte is what makes unpacking bearable without a kernel.
    table = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), -1)
    pairs = table.index_select(0, codes.flatten().int()).view(len(codes), scales.shape[1], BLOCK_SIZE)
    return (pairs * scales[..., None]).flatten(1)


def linear_nf4_reference(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The specification of `linear_nf4`, in float64."""
    y = x.double() @ unpacked(codes, scales.double()).T
    return add_epilogue(y, bias, residual).to(x.dtype)


def linear_nf4_swiglu_reference(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    """The specification of `linear_nf4_swiglu`, in float64."""
    gated, raised = (
        linear_nf4_reference(x.double(), *weight, None, None) for weight in ((gate, gate_scales), (up, up_scales))
    )
    return activation.swiglu_reference(gated, raised).to(x.dtype)


_linear = Operation("linear_nf4", linear_nf4_reference)
_swiglu = Operation("linear_nf4_swiglu", linear_nf4_swiglu_reference)


@_linear.implementation("triton")
def _linear_triton(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return w4a16_triton(x, (codes, scales, None), (None, None, None), bias, residual, _levels(x.device))


@_swiglu.implementation("triton")
def _swiglu_triton(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    return w4a16_triton(x, (gate, gate_scales, None), (up, up_scales, None), None, None, _levels(x.device))


def _misfit(x: Tensor, *_others: Tensor | None) -> str | None:
    return native.misfit(x)


@_linear.implementation("native", _misfit)
def _linear_native(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    rows, columns = as_rows(x), len(codes)
    if len(rows) <= FEW_CPU_ROWS or products.in_panels(rows, columns):
        return products.nf4_product(rows, (codes, scales), None, bias, residual).view(*x.shape[:-1], columns)
    y = product_by_tiles(rows, columns, lambda tile: products.unpack_nf4(codes[tile], scales[tile], x.dtype))
    return add_epilogue(y.view(*x.shape[:-1], columns), bias, residual)


@_swiglu.implementation("native", _misfit)
def _swiglu_native(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    rows = as_rows(x)
    if len(rows) <= FEW_CPU_ROWS or products.in_panels(rows, len(gate)):
        y = products.nf4_product(rows, (gate, gate_scales), (up, up_scales), None, None)
        return y.view(*x.shape[:-1], len(gate))
    raised = _linear_native(x, up, up_scales, None, None)
    return activation.swiglu(_linear_native(x, gate, gate_scales, None, None), raised)


@_linear.implementation("torch")
def _linear_torch(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    def weight(tile: slice) -> Tensor:
        return unpacked(codes[tile], scales[tile]).to(x.dtype)

    y = product_by_tiles(as_rows(x), len(codes), weight)
    return add_epilogue(y.view(*x.shape[:-1], len(codes)), bias, residual)


@_swiglu.implementation("torch")
def _swiglu_torch(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    raised = _linear_torch(x, up, up_scales, None, None)
    return activation.swiglu(_linear_torch(x, gate, gate_scales, None, None), raised)


def linear_nf4(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x W^T + bias + residual with nf4 weights, W[n, k] = scales[n, k // 64] * LEVELS[code[n, k]].

    x: [..., in] floating, in a multiple of 64; codes: [out, in / 2] uint8; scales: [out, in / 64] float32; bias: [out];
    residual: [..., out] in the dtype of x. Returns [..., out] like x. Raises ValueError for what does not fit.
    """
    scales = _checked(x, codes, scales)
    check_epilogue(x, len(codes), bias, residual)
    return _linear.on(x.device)(x, codes, scales, bias, residual)


def linear_nf4_swiglu(x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor) -> Tensor:
    """silu(x G^T) * (x U^T), x read once; gate and up are packed weights of one shape as in `linear_nf4`.

    Raises ValueError for what does not fit.
    """
    gate_scales, up_scales = _checked(x, gate, gate_scales), _checked(x, up, up_scales)
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    return _swiglu.on(x.device)(x, gate, gate_scales, up, up_scales)


def _checked(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The scales, contiguous. Raises ValueError if the three do not fit."""
    if codes.dtype != torch.uint8 or codes.ndim != 2 or not codes.is_contiguous():
        raise ValueError(f"codes must be contiguous uint8 [out, in / 2], got {codes.dtype} {tuple(codes.shape)}")
    inner = 2 * codes.shape[1]
    if not x.is_floating_point() or x.shape[-1:] != (inner,) or inner % BLOCK_SIZE or inner == 0:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; codes {tuple(codes.shape)} take [..., {inner}], a multiple of 64"
        )
    if scales.shape != (len(codes), inner // BLOCK_SIZE) or not scales.is_floating_point():
        raise ValueError(
            f"scales must be floating {(len(codes), inner // BLOCK_SIZE)}, got {scales.dtype} {tuple(scales.shape)}"
        )
    return scales.contiguous()
