"""The 8-bit float e4m3: how kernels read and write it, also for chips on which Triton lacks the type.

A code has a sign, an exponent of four bits with a bias of 7, and three bits of mantissa: multiples of 2^-9 up to 2^-6,
then eight numbers for each power of two up to 448. 0x7F and 0xFF are NaN; there is no infinity.

From sm_89 on an instruction converts two codes to or from float16; on sm_80 and sm_86 the codes are bytes (uint8),
whose bits are moved to those of a wider float. Every way rounds to the nearest, ties to even.
Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

from functools import cache

import torch
from torch import Tensor

from .configs import family
from .quantize_rows import E4M3
from .triton_language import tl, triton

_NO_E4M3 = ("sm80", "sm86", "gfx942")  # Triton lacks the type, or converts it with many registers


def readable(codes: Tensor) -> Tensor:
    """The codes in e4m3 as Triton can read and write them on this chip; tensors of other dtypes as they are."""
    return codes.view(torch.uint8) if codes.dtype == E4M3 and family(codes.device) in _NO_E4M3 else codes


@triton.jit
def widened(codes, x):  # type: ignore[no-untyped-def]
    """Codes of 8 bits in the dtype of the elements at x, exactly: int8, or e4m3, as bits where chips lack the type."""
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint16)
        # The exponent of e4m3 has a bias of 7, that of float16 one of 15; subnormal numbers have the same layout.
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        return half.to(x.dtype.element_ty)
    elif codes.dtype == tl.float8e4nv:
        return codes.to(tl.float16).to(x.dtype.element_ty)  # e4m3 to bfloat16 at once takes slower instructions
    else:
        return codes.to(x.dtype.element_ty)


@triton.jit
def narrowed(x, codes):  # type: ignore[no-untyped-def]
    """x, float32 within +-448, in the dtype of the elements at codes; for uint8 the bits of e4m3."""
    if codes.dtype.element_ty == tl.uint8:
        size = tl.abs(x)
        bits = size.to(tl.uint32, bitcast=True)
        # Half of the 20 bits that are cut off, less one unless what is kept is odd; then 127 - 7 off the exponent.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000  # added to 2^14, rounded to multiples of 2^-9
        code = tl.where(size < 0.015625, small, normal) | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)
        return code.to(tl.uint8)
    else:
        return x.to(codes.dtype.element_ty)


def widen(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes in e4m3 as `dtype`, exactly. A table is five times as fast on a CPU as torch's conversion."""
    return _values(codes.device, dtype).index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


@cache
def _values(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values of the 256 codes."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).to(dtype)
