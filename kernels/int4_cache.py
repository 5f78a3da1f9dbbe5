"""Keys and values in four bits: what an int4 KV cache stores for each token and head, and how it is read.

    y = H (x - o);    step = max |y| / 8;    code = min(floor(y / step) + 8, 15);    scale = step / (2 n)
    x is read as scale * H (2 code - 15) + o

H is the Walsh-Hadamard matrix of the n = head_dim channels (H H = n), which spreads a large channel over all of them,
so that one scale serves a head. A code represents the middle of its step, and 16 steps reach from -max |y| to max |y|.
A vector of zeros has the scale 0. Byte j holds the codes of channel j (its lower half) and of channel j + n / 2.

For values o is 0. For keys o is the bias of their projection, rotated like the token's key: in Qwen2.5 that bias is a
hundred times as large as the rest of a key in some channels, and four bits of the sum would lose most of the rest. The
bias's term of a score depends only on positions, so attention adds it exactly.

The transform is additions in a fixed order, so every implementation stores the same codes for the same numbers.
Memory: n / 2 + 4 bytes for each token and head, 68 at full size, where int8 takes 132.
Source: Ashkboos et al. 2024, arXiv:2404.00456 (QuaRot: Hadamard transforms of the KV cache).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .triton_language import tl, triton

DTYPE = torch.uint8
"""The dtype of an int4 cache: two codes per byte, so that it differs from an int8 cache."""
HEAD_DIMS = (16, 32, 64, 128, 256, 512)
"""Values of head_dim that an int4 cache supports."""


@dataclass(frozen=True)
class KeyBias:
    """The bias that is subtracted from the keys of an int4 cache, and how it is rotated for each token.

    bias: [kv_heads, head_dim] of the dtype of the queries; cos, sin: [tokens, head_dim / 2] float32, indexed by the
    token's position in its sequence. Channels are paired by halves.
    """

    bias: Tensor
    cos: Tensor
    sin: Tensor

    def rotated(self, length: int, dtype: torch.dtype) -> Tensor:
        """The rotated bias of the first `length` tokens of a sequence: [length, kv_heads, head_dim]."""
        a, b = self.bias.to(dtype).chunk(2, -1)
        cos, sin = self.cos[:length, None].to(dtype), self.sin[:length, None].to(dtype)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def is_int4(cache: Tensor) -> bool:
    """Whether these keys or values are stored in four bits."""
    return cache.dtype == DTYPE


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x over the last dimension, a power of two, by additions in the order that every implementation uses."""
    width = 1
    while width < x.shape[-1]:
        a, b = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        width *= 2
    return x


def quantize_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., head_dim], without the offset. Returns codes [..., head_dim / 2] uint8 and scales [...] float32."""
    y = walsh_hadamard(x.float())
    step = y.abs().amax(-1) / 8
    codes = torch.floor(y / torch.where(step > 0, step, 1.0)[..., None]).add(8).clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, -1)
    return low | high << 4, step / (2 * x.shape[-1])


def dequantize_int4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse except for rounding: [..., head_dim] of `dtype`, float32 or wider."""
    unpacked = torch.cat((codes & 15, codes >> 4), -1).to(dtype)
    return walsh_hadamard(2 * unpacked - 15) * scales[..., None]


@triton.jit
def walsh_hadamard_rows(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """In a kernel: H x for x [ROWS, WIDTH] float32 with WIDTH = 2^STAGES."""
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(x, (ROWS, WIDTH >> (stage + 1), 2, 1 << stage))
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, WIDTH))
    return x
