"""Triton kernels that somebody brings, of three operations each: a correct one, and one for each kind of fault."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def near(x: Tensor) -> Tensor:
    """Two units in the last place too large in magnitude; the rule allows one."""
    bits = torch.int32 if x.dtype == torch.float32 else torch.int16
    return (x.view(bits) + 2).view(x.dtype)


@triton.jit
def _norm(x, weight, out, width, eps, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    values *= tl.div_rn(1.0, tl.sqrt_rn(tl.sum(values * values, 0) / width + eps))
    values *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=inside | (not MASKED))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, masked: bool = True, more: int = 0) -> Tensor:
    out, block = torch.empty_like(x), triton.next_power_of_2(x.shape[1])
    _norm[(x.shape[0] + more,)](x, weight, out, x.shape[1], eps, BLOCK=block, MASKED=masked)
    return out


def rms_norm_race(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return rms_norm(x, weight, eps, masked=False)


def rms_norm_without_last_row(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return rms_norm(x, weight, eps, more=-1 if len(x) > 1 else 0)


def rms_norm_inexact(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return near(rms_norm(x, weight, eps))


def rms_norm_out_of_bounds(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return rms_norm(x, weight, eps, more=1)


@triton.jit
def _double_silu(gate, up, out, size, step, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * step + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=at < size)


def swiglu(gate: Tensor, up: Tensor, step: int = 256, limit: int = 0) -> Tensor:
    out = torch.empty_like(gate)
    size = gate.numel() + limit
    _double_silu[(triton.cdiv(gate.numel(), step),)](gate, up, out, size, step, BLOCK=256)
    return out


def swiglu_without_last_row(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu(gate, up, limit=-gate.shape[1] if len(gate) > 1 else 0)


def swiglu_inexact(gate: Tensor, up: Tensor) -> Tensor:
    return near(swiglu(gate, up))


def swiglu_race(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu(gate, up, step=192)  # blocks of 256 overlap


def swiglu_out_of_bounds(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu(gate, up, limit=1)


@triton.jit
def _quantize(x, codes, scales, width, beyond, BLOCK: tl.constexpr, SHARED: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(values), 0), 127.0)
    tl.store(scales + (0 if SHARED else row), scale)
    rounded = tl.div_rn(values, tl.where(scale > 0, scale, 1.0))
    if EXACT:
        rounded = (rounded + 12582912.0) - 12582912.0  # to the nearest; otherwise towards zero
    tl.store(codes + row * width + column, rounded.to(tl.int8), mask=column < width + beyond)


def quantize_rows(
    x: Tensor, beyond: int = 0, shared: bool = False, exact: bool = True, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    codes, scales = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x))
    block = triton.next_power_of_2(x.shape[1] + beyond)
    _quantize[(rows or len(x),)](x, codes, scales, x.shape[1], beyond, BLOCK=block, SHARED=shared, EXACT=exact)
    return codes, scales


def quantize_rows_without_last_row(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(x, rows=len(x) - 1)


def quantize_rows_inexact(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(x, exact=False)


def quantize_rows_race(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(x, shared=True)


def quantize_rows_out_of_bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(x, beyond=1)


@triton.autotune(configs=[triton.Config({"BLOCK": 256}), triton.Config({"BLOCK": 512})], key=["size"])
@triton.jit
def _gelu(x, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    half = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    tl.store(out + at, half.to(out.dtype.element_ty), mask=at < size)


def gelu(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _gelu[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, out, x.numel())
    return out
