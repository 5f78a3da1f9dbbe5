"""Dynamic int8 quantization of activations, one scale per token.

    scales[row] = max_k |x[row, k]| / 127,    codes[row, k] = round(x[row, k] / scales[row])

with ties to even and codes within +-127; a row of zeros has scale 0 and codes 0. The arithmetic is float32 whatever the
dtype, so codes and scales are the same on every backend.

Memory-bound: each element is read twice, the second time from the cache, and one byte is written.
Source: Dettmers et al. 2022, arXiv:2208.07339.
"""

import torch
from torch import Tensor

from . import native
from .dispatch import Operation
from .triton_language import tl, triton

LARGEST = 127


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The specification, in float32."""
    wide = x.float()
    scales = wide.abs().amax(-1) / LARGEST
    # For a row of zeros, a divisor of 1 avoids 0 / 0.
    codes = torch.round(wide / torch.where(scales > 0, scales, 1.0)[..., None])
    return codes.clamp(-LARGEST, LARGEST).to(torch.int8), scales


@triton.jit
def _kernel(x, codes, scales, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, inner, BLOCK):
        part = tl.load(x + row * inner + first + k, mask=first + k < inner, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(part), propagate_nan=tl.PropagateNan.ALL)
    scale = tl.div_rn(tl.max(largest), 127.0)
    tl.store(scales + row, scale)
    divisor = tl.where(scale > 0, scale, 1.0)
    for first in range(0, inner, BLOCK):
        part = tl.load(x + row * inner + first + k, mask=first + k < inner, other=0).to(tl.float32)
        code = tl.clamp(tl.div_rn(part, divisor), -127.0, 127.0)
        code = (code + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to an integer, ties to even
        tl.store(codes + row * inner + first + k, code.to(tl.int8), mask=first + k < inner)


_operation = Operation("quantize_rows", reference)


@_operation.implementation("triton")
def _triton(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        block = min(triton.next_power_of_2(x.shape[-1]), 4096)
        _kernel[(scales.numel(),)](x, codes, scales, x.shape[-1], BLOCK=block, num_warps=max(1, block // 512))
    return codes, scales


@_operation.implementation("native", native.misfit)
def _native(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[:-1])
    native.call("quantize_rows", x.contiguous(), codes, scales, scales.numel(), x.shape[-1], x.dtype)
    return codes, scales


_operation.implementation("torch")(reference)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [..., channels] of any floating dtype. Returns codes, int8 in the shape of x, and scales [...]
    float32.

    x ~ codes * scales[..., None]. Raises ValueError if x is of an integer dtype or has no channels.
    """
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantize_rows takes floating [..., channels], got {x.dtype} {tuple(x.shape)}")
    return _operation.on(x.device)(x)
