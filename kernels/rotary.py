"""Rotary position embedding with float positions, in either pairing.

    angle[t, j] = position[t] * f[j]                                  f[j] = theta ** (-2 j / dim), j = 0 .. dim/2 - 1
    half:         (x[j], x[j + dim/2])  rotated by angle[t, j]        Qwen2's pairing
    interleaved:  (x[2j], x[2j + 1])    rotated by angle[t, j]        RoTE's pairing

where rotating (a, b) by phi gives (a cos phi - b sin phi, b cos phi + a sin phi). Positions are floats, so one
operation serves the index of a token (RoPE) and its time (the report's RoTE: position = -2 pi * seconds). Channels
beyond 2 * len(f) are unchanged. Angles are computed in float32 by that one product, as in the reference model.

Memory-bound: each element is read and written once, 2 * 2 bytes and 3 FLOPs in bf16. The Triton kernel takes cos and
sin from a table, 8 bytes per pair and token, computed once per forward pass for all layers and heads: angles reach 10^5
radians, where an accurate sine needs a reduction by hundreds of bits of pi, and local memory. A program reads the table
of its tokens once for several heads; between programs it stays in the L2 cache.
Source: Su et al. 2021 (RoPE); Goel et al. 2024, arXiv:2410.12109 (RoTE).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from . import native
from .arguments import FLOATING, INTEGERS, check_tensors
from .configs import Config, Configs
from .dispatch import Operation
from .strides import with_unit_stride
from .triton_language import tl, triton

Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rotation:
    """Position of each token and frequency of each channel pair; made once per forward pass for all layers.

    positions: [batch, time] float32; frequencies: [pairs] float32, radians per unit of position.
    """

    positions: Tensor
    frequencies: Tensor
    pairing: Pairing = "half"

    @cached_property
    def angles(self) -> Tensor:
        """[batch, time, pairs] float32, in radians."""
        return self.positions.float()[..., None] * self.frequencies

    @cached_property
    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles, each [batch, time, 1, pairs] float32, to broadcast over heads."""
        angles = self.angles[..., None, :]
        return angles.cos(), angles.sin()


def rope_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """f[j] = theta ** (-2 j / dim) for j < dim / 2, float32.

    They are computed on the CPU and copied, so that they have the same bits on every device.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return (1.0 / theta**exponents).to(device)


def reference(x: Tensor, rotation: Rotation) -> Tensor:
    """The specification: float64 from the float32 angles on, pairs gathered by index."""
    pairs = rotation.frequencies.numel()
    j = torch.arange(pairs, device=x.device)
    first, second = (j, j + pairs) if rotation.pairing == "half" else (2 * j, 2 * j + 1)
    angles = rotation.angles.double()[..., None, :]
    a, b = x[..., first].double(), x[..., second].double()
    out = x.double().clone()
    out[..., first] = a * angles.cos() - b * angles.sin()
    out[..., second] = b * angles.cos() + a * angles.sin()
    return out.to(x.dtype)


_operation = Operation("rotary", reference)


@triton.jit
def load_turns(cos, sin, tokens, channels, mask, PAIRS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Factors of each channel and of its partner: (cos, signed sin), [tokens, channels] float32.

    cos, sin: tables [tokens, PAIRS]. mask: [tokens, channels], false for tokens past the end.
    """
    if HALF:
        pair, sign = channels % PAIRS, tl.where(channels < PAIRS, -1.0, 1.0)
    else:
        pair, sign = channels // 2, tl.where(channels % 2 == 0, -1.0, 1.0)
    turning = mask & (channels < 2 * PAIRS)
    offsets = tokens.to(tl.int64) * PAIRS + pair
    return tl.load(cos + offsets, mask=turning, other=1.0), sign * tl.load(sin + offsets, mask=turning, other=0.0)


@triton.jit
def load_turned(x, rows, channels, mask, cos, signed_sin, PAIRS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """A head of some tokens, rotated: [tokens, channels] float32.

    Each channel's partner is loaded again, from the L1 cache, which is as fast as exchanging halves between threads,
    and simpler. rows: [tokens, 1], offsets of each token's head.
    """
    partner = (channels + PAIRS) % (2 * PAIRS) if HALF else channels ^ 1
    own = tl.load(x + rows + channels, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + rows + partner, mask=mask & (channels < 2 * PAIRS), other=0.0).to(tl.float32)
    return own * cos + other * signed_sin


@triton.jit
def token_rows(tokens, time, batch_stride, time_stride):  # type: ignore[no-untyped-def]
    """Offsets of the tokens of a [batch, time, ...] tensor, for indices into batch * time; int64."""
    return (tokens // time).to(tl.int64) * batch_stride + (tokens % time).to(tl.int64) * time_stride


@triton.jit(do_not_specialize=["tokens", "time"])
def _rotary_kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    cos,
    sin,
    x_batch,
    x_time,
    x_head,
    tokens,
    time,
    heads,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    mask = (token < tokens) & (channel < HEAD_DIM)
    turn_cos, turn_sin = load_turns(cos, sin, token, channel, mask, PAIRS, HALF)
    rows = token_rows(token, time, x_batch, x_time)
    first = tl.program_id(1) * BLOCK_HEADS
    for head in range(first, tl.minimum(first + BLOCK_HEADS, heads)):
        turned = load_turned(x, rows + head * x_head, channel, mask, turn_cos, turn_sin, PAIRS, HALF)
        to = out + (token.to(tl.int64) * heads + head) * HEAD_DIM + channel
        tl.store(to, turned.to(out.dtype.element_ty), mask=mask)


# Few tokens (decode): one warp for each head of a token. Many tokens: eight at a time, 16 bytes of bf16 per thread, and
# four heads in turn, which share the cosines. Only memory limits either, so every chip has the same configs.
_FEW = Configs("rotary, few tokens", Config({"BLOCK_TOKENS": 1, "BLOCK_HEADS": 1}, num_warps=1, num_stages=1))
_MANY = Configs("rotary, many tokens", Config({"BLOCK_TOKENS": 8, "BLOCK_HEADS": 4}, num_warps=4, num_stages=1))


def rotation_config(tokens: int, device: torch.device) -> Config:
    """The config of the kernels that rotate `tokens` tokens: BLOCK_TOKENS, BLOCK_HEADS."""
    return (_FEW if tokens <= 16 else _MANY).on(device)


@_operation.implementation("triton")
def _triton(x: Tensor, rotation: Rotation) -> Tensor:
    x = with_unit_stride(x)
    batch, time, heads, head_dim = x.shape
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    cos, sin = rotation.cos_sin
    config = rotation_config(batch * time, x.device)
    blocks = config.blocks
    grid = triton.cdiv(batch * time, blocks["BLOCK_TOKENS"]), triton.cdiv(heads, blocks["BLOCK_HEADS"])
    _rotary_kernel[grid](
        x,
        out,
        cos,
        sin,
        *x.stride()[:3],
        batch * time,
        time,
        heads,
        HEAD_DIM=head_dim,
        PAIRS=cos.shape[-1],
        HALF=rotation.pairing == "half",
        BLOCK_CHANNELS=triton.next_power_of_2(head_dim),
        **config.options(),
    )
    return out


@_operation.implementation("native", lambda x, _: native_misfit(x))
def _native(x: Tensor, rotation: Rotation) -> Tensor:
    x = with_unit_stride(x)
    out = x.new_empty(x.shape)
    cos, sin = rotation.cos_sin
    half = rotation.pairing == "half"
    native.call("rotary", x, out, cos, sin, *x.shape, cos.shape[-1], half, *x.stride()[:3], x.dtype)
    return out


def native_misfit(*tensors: Tensor) -> str | None:
    """Why the native kernels do not rotate tensors [..., head_dim], or None."""
    if tensors[0].shape[-1] > 512:  # size of their row buffer
        return f"head_dim {tensors[0].shape[-1]}"
    return native.misfit(*tensors)


@_operation.implementation("torch")
def _torch(x: Tensor, rotation: Rotation) -> Tensor:
    cos, sin = rotation.cos_sin
    pairs = cos.shape[-1]
    if rotation.pairing == "half":
        first, second = slice(pairs), slice(pairs, 2 * pairs)
    else:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    a, b = x[..., first], x[..., second]
    out = torch.empty_like(x)
    out[..., 2 * pairs :] = x[..., 2 * pairs :]
    # cos and sin are float32, so the products are, too; the sum is rounded once, when it is written to `out`.
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


def rotary(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every head of x by its token's position.

    x: [batch, time, heads, head_dim] of any floating dtype. Returns a tensor like x, computed in float32.
    Raises ValueError when the rotation does not fit x.
    """
    check_rotation(x, rotation)
    return _operation.on(x.device)(x, rotation)


def check_rotation(x: Tensor, rotation: Rotation) -> None:
    """Raise ValueError unless `rotation` fits x: [batch, time, heads, head_dim]."""
    check_tensors(x, FLOATING, x=x, frequencies=rotation.frequencies)
    check_tensors(x, FLOATING | INTEGERS, positions=rotation.positions)
    if x.ndim != 4 or rotation.positions.shape != x.shape[:2] or 2 * rotation.frequencies.numel() > x.shape[-1]:
        raise ValueError(
            f"positions {tuple(rotation.positions.shape)} with {rotation.frequencies.numel()} pairs cannot rotate a "
            f"tensor of shape {tuple(x.shape)}; expected [batch, time, heads, head_dim]"
        )
