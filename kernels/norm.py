"""LayerNorm and RMSNorm over the last dimension, alone or after adding to the residual stream.

    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    rms_norm(x)   = x / sqrt(mean(x^2) + eps) * weight
    add_*_norm(x, residual): h = residual + x; returns (norm(h), h)

Statistics are float32 whatever the dtype. "Add, then norm" is one operation because both are memory-bound: fused, they
read 2 and write 2 elements per channel; separate, they read 3 and write 2.

The Triton kernel gives each row to one program, which holds it in registers: every element is read once and written
once, and the mean is known before deviations are squared. Weight and bias, the same for all rows, stay in the caches.
The native kernel keeps a row in the L1 cache between its passes over it. FLOPs: about 5 per channel for RMSNorm and 8
for LayerNorm, which take far less time than the bytes.
Source: Ba et al. 2016 (LayerNorm); Zhang & Sennrich 2019 (RMSNorm).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import native
from .arguments import FLOATING, check_tensors
from .dispatch import Operation
from .strides import strided_rows
from .triton_language import tl, triton


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The specification of `layer_norm`, in float64."""
    wide = x.double()
    centered = wide - wide.mean(-1, keepdim=True)
    normed = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.double() + bias.double()).to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of `rms_norm`, in float64."""
    wide = x.double()
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The specification of `add_layer_norm`: the sum is rounded to the dtype of the stream before it is normed."""
    hidden = residual + x
    return layer_norm_reference(hidden, weight, bias, eps), hidden


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification of `add_rms_norm`: the sum is rounded to the dtype of the stream before it is normed."""
    hidden = residual + x
    return rms_norm_reference(hidden, weight, eps), hidden


_layer_norm = Operation("layer_norm", layer_norm_reference)
_rms_norm = Operation("rms_norm", rms_norm_reference)
_add_layer_norm = Operation("add_layer_norm", add_layer_norm_reference)
_add_rms_norm = Operation("add_rms_norm", add_rms_norm_reference)


@triton.jit
def normalize_row(x, inside, width, eps, CENTER: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row divided by its standard deviation (CENTER, LayerNorm) or its root mean square; float32.

    x: [BLOCK] float32, zero where `inside` is false: past the row's `width` channels.
    """
    if CENTER:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    mean_square = tl.sum(x * x, 0) / width
    # Exact, as it runs once per row: the hardware's approximate rsqrt would give all channels the same error.
    return x * tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    bias,
    normed,
    hidden,
    x_row,
    residual_row,
    width,
    eps,
    ADD: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    values = tl.load(x + row * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row * residual_row + channel, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(hidden.dtype.element_ty)
        tl.store(hidden + row * width + channel, rounded, mask=inside)
        values = rounded.to(tl.float32)
    values = normalize_row(values, inside, width, eps, CENTER)
    values *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        values += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + channel, values.to(normed.dtype.element_ty), mask=inside)


def row_blocks(width: int) -> dict[str, int]:
    """Block and warps for a row of `width` channels in one program: at most 32 float32 per thread up to 16384 channels.

    Up to 4096 channels four warps, as in the products that normalize their results (`packed_product.AddNorm`).
    """
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 4), 16)}


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """(normed,), or (normed, sum) with a residual; LayerNorm with a bias, RMSNorm without."""
    width = x.shape[-1]
    outputs = tuple(x.new_empty(x.shape) for _ in range(1 if residual is None else 2))
    rows = strided_rows(x)
    residual_rows = None if residual is None else strided_rows(residual)
    _kernel[(len(rows),)](
        rows,
        residual_rows,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        outputs[0],
        None if residual is None else outputs[1],
        rows.stride(0),
        0 if residual_rows is None else residual_rows.stride(0),
        width,
        eps,
        ADD=residual is not None,
        CENTER=bias is not None,
        **row_blocks(width),
    )
    return outputs


@_layer_norm.implementation("triton")
def _layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _launch(x, None, weight, bias, eps)[0]


@_rms_norm.implementation("triton")
def _rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, None, weight, None, eps)[0]


@_add_layer_norm.implementation("triton")
def _add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normed, hidden = _launch(x, residual, weight, bias, eps)
    return normed, hidden


@_add_rms_norm.implementation("triton")
def _add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, hidden = _launch(x, residual, weight, None, eps)
    return normed, hidden


def _native(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """Same as `_launch`."""
    outputs = tuple(x.new_empty(x.shape) for _ in range(1 if residual is None else 2))
    rows = strided_rows(x)
    residual_rows = None if residual is None else strided_rows(residual)
    native.call(
        "norm",
        rows,
        residual_rows,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        outputs[0],
        None if residual is None else outputs[1],
        *rows.shape,
        rows.stride(0),
        0 if residual_rows is None else residual_rows.stride(0),
        eps,
        x.dtype,
    )
    return outputs


def _misfit(*arguments: Tensor | float) -> str | None:
    return native.misfit(*(argument for argument in arguments if isinstance(argument, Tensor)))


@_layer_norm.implementation("native", _misfit)
def _layer_norm_native(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _native(x, None, weight, bias, eps)[0]


@_rms_norm.implementation("native", _misfit)
def _rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _native(x, None, weight, None, eps)[0]


@_add_layer_norm.implementation("native", _misfit)
def _add_layer_norm_native(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normed, hidden = _native(x, residual, weight, bias, eps)
    return normed, hidden


@_add_rms_norm.implementation("native", _misfit)
def _add_rms_norm_native(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, hidden = _native(x, residual, weight, None, eps)
    return normed, hidden


@_layer_norm.implementation("torch")
def _layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@_rms_norm.implementation("torch")
def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@_add_layer_norm.implementation("torch")
def _add_layer_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden = residual + x
    return _layer_norm_torch(hidden, weight, bias, eps), hidden


@_add_rms_norm.implementation("torch")
def _add_rms_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    hidden = residual + x
    return _rms_norm_torch(hidden, weight, eps), hidden


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension. x: [..., channels]; weight, bias: [channels]. Returns a tensor like x.

    Raises ValueError when shapes do not fit, as all norms do.
    """
    _check(x, weight, bias)
    return _layer_norm.on(x.device)(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension. x: [..., channels]; weight: [channels]. Returns a tensor like x."""
    _check(x, weight)
    return _rms_norm.on(x.device)(x, weight, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and LayerNorm the sum. Returns (normed, sum), both like x."""
    _check(x, weight, bias, residual=residual)
    return _add_layer_norm.on(x.device)(x, residual, weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and RMSNorm the sum. Returns (normed, sum), both like x."""
    _check(x, weight, residual=residual)
    return _add_rms_norm.on(x.device)(x, residual, weight, eps)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    check_tensors(x, FLOATING, x=x, weight=weight, bias=bias, residual=residual)
    parameters = [weight] if bias is None else [weight, bias]
    if any(parameter.shape != x.shape[-1:] for parameter in parameters):
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in parameters)
        raise ValueError(f"weight and bias must have the shape of the last dimension of {tuple(x.shape)}, got {shapes}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"the residual's shape {tuple(residual.shape)} must be that of x, {tuple(x.shape)}")
