"""Dynamic quantization of activations to int8 or to the 8-bit float e4m3, one scale per token.

    scales[row] = max_k |x[row, k]| / largest,    codes[row, k] = round(x[row, k] / scales[row])

with ties to even and codes within +-largest, which is 127 for int8 and 448 for e4m3; a row of zeros has scale 0 and
codes 0. The arithmetic is float32 whatever the dtype, so codes and scales are the same on every backend.

Memory-bound: each element is read twice, the second time from the cache, and one byte is written.
Source: Dettmers et al. 2022, arXiv:2208.07339; for e4m3 Micikevicius et al. 2022, arXiv:2209.05433.
"""

import torch
from torch import Tensor

from . import native
from .dispatch import Operation
from .triton_language import tl, triton

E4M3 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127, E4M3: 448}
"""The largest code of each dtype."""


def reference(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """The specification, in float32."""
    wide, largest = x.float(), LARGEST[dtype]
    scales = wide.abs().amax(-1) / largest
    # For a row of zeros, a divisor of 1 avoids 0 / 0.
    codes = (wide / torch.where(scales > 0, scales, 1.0)[..., None]).clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales


@triton.jit
def _kernel(x, codes, scales, inner, LARGEST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, inner, BLOCK):
        part = tl.load(x + row * inner + first + k, mask=first + k < inner, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(part), propagate_nan=tl.PropagateNan.ALL)
    scale = tl.div_rn(tl.max(largest), LARGEST)
    tl.store(scales + row, scale)
    divisor = tl.where(scale > 0, scale, 1.0)
    for first in range(0, inner, BLOCK):
        part = tl.load(x + row * inner + first + k, mask=first + k < inner, other=0).to(tl.float32)
        code = tl.clamp(tl.div_rn(part, divisor), -LARGEST, LARGEST)
        if codes.dtype.element_ty == tl.int8:
            code = (code + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to an integer, ties to even
        tl.store(codes + row * inner + first + k, code.to(codes.dtype.element_ty), mask=first + k < inner)


_operation = Operation("quantize_rows", reference)


@_operation.implementation("triton")
def _triton(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        block = min(triton.next_power_of_2(x.shape[-1]), 4096)
        constants = {"LARGEST": float(LARGEST[dtype]), "BLOCK": block, "num_warps": max(1, block // 512)}
        _kernel[(scales.numel(),)](x, codes, scales, x.shape[-1], **constants)
    return codes, scales


def _misfit(x: Tensor, dtype: torch.dtype) -> str | None:
    return native.misfit(x) if dtype == torch.int8 else "codes in e4m3"


@_operation.implementation("native", _misfit)
def _native(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    codes, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[:-1])
    native.call("quantize_rows", x.contiguous(), codes, scales, scales.numel(), x.shape[-1], x.dtype)
    return codes, scales


_operation.implementation("torch")(reference)


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Quantize x [..., channels] of any floating dtype. Returns codes, of `dtype` in the shape of x, and scales [...]
    float32.

    dtype: torch.int8 or torch.float8_e4m3fn. x ~ codes * scales[..., None]. Raises ValueError if x is of an integer
    dtype or has no channels, and for other dtypes of codes.
    """
    if dtype not in LARGEST:
        raise ValueError(f"quantize_rows makes codes in {', '.join(map(str, LARGEST))}, not {dtype}")
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantize_rows takes floating [..., channels], got {x.dtype} {tuple(x.shape)}")
    return _operation.on(x.device)(x, dtype)
