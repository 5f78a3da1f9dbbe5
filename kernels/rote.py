"""The end of the encoder: average pooling by two, LayerNorm, and rotary time embedding (RoTE).

    pooled[t] = (x[2t] + x[2t + 1]) / 2
    normed    = LayerNorm(pooled)
    out = normed with channel pair (2i, 2i + 1) rotated by angle[w, t, i], channels beyond 2 * dim unchanged

The angles, as the released checkpoints apply them, depend on the window's index w in its audio and the frame t in it:

    f[j]   = theta ** (-2 j / dim)                       j = 0 .. dim/2 - 1
    axis1  = w / theta * f[j]        each value twice    pairs 0 .. dim/2 - 1 of the first dim channels
    axis2  = t / theta * 2 pi * f[j] each value twice    the next dim channels
    tau    = w * frames * frame_seconds + t * frame_seconds                absolute seconds
    angle  = concat(axis1, axis2) * (-tau * 2 pi)

They reach 4e4 rad at the end of 30 minutes, where the spacing of float32 is 0.004 rad: the products above must be
float32 and in this order, because another order changes the angles visibly. cos and sin must be accurate to full
float32 precision.

One window at full size reads 1500 * 1280 and writes 750 * 1280 elements; separate kernels for pooling, norm and
rotation would read and write another 4 * 750 * 1280. The Triton kernel gives each token to one program, which reads its
two positions and its `dim` angles, 1 KiB, and writes its row: 8.7 KiB per token in bf16, and some 40 FLOPs per channel
pair. The angles are the rows of a table that is computed once (`TimeEmbedding.table`) and shared by all passes.
Source: Goel et al. 2024, arXiv:2410.12109, in the axial form of the released checkpoints.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from . import native
from .arguments import FLOAT32, FLOATING, INT64, check_tensors
from .dispatch import Operation
from .native.threads import thread_count
from .norm import layer_norm_reference, normalize_row, row_blocks
from .rotary import rope_frequencies
from .strides import with_unit_stride
from .triton_language import tl, triton


def pooled_length(positions: int) -> int:
    """Number of tokens after pooling `positions` encoder positions by two; 0 for fewer than two."""
    return max(0, (positions - 2) // 2 + 1)


@dataclass(frozen=True)
class TimeEmbedding:
    """The parameters of RoTE. theta: base and maximum position; dim: rotary width of each axis, in channels;
    frames: tokens in a full window; frame_seconds: duration of one token."""

    theta: float
    dim: int
    frames: int
    frame_seconds: float

    def angles(self, windows: Tensor, length: int) -> Tensor:
        """Angles of the first `length` frames of each window: [batch, length, dim] float32.

        windows: [batch] int64, the index of each window in its own audio.
        """
        device = windows.device
        f = rope_frequencies(self.dim, self.theta, device)
        t = torch.arange(length, dtype=torch.float32, device=device)
        axis1 = (windows.float() / self.theta)[:, None] * f
        axis2 = (t / self.theta * (2 * math.pi))[:, None] * f
        tau = (windows * self.frames)[:, None] * self.frame_seconds + t * self.frame_seconds
        both = torch.cat(torch.broadcast_tensors(axis1[:, None], axis2[None]), dim=-1)
        return both * (-tau * 2 * math.pi)[..., None]

    def table(self, windows: int, device: torch.device) -> Tensor:
        """Angles of at least the first `windows` full windows: [.., frames, dim] float32, computed once and kept.

        768 KB per window at full size. The number of windows is rounded up to a power of two, so that longer audio
        seldom needs another table.
        """
        return _table(self, 1 << (windows - 1).bit_length(), device)


@lru_cache(maxsize=2)
def _table(embedding: TimeEmbedding, windows: int, device: torch.device) -> Tensor:
    return embedding.angles(torch.arange(windows, device=device), embedding.frames)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, angles: Tensor | None, windows: Tensor | None
) -> Tensor:
    """The specification: float64 from the float32 angles on."""
    length = pooled_length(x.shape[1])
    angles = _rows_of_table(angles, windows, length)
    wide = x.double()
    pooled = (wide[:, 0 : 2 * length : 2] + wide[:, 1 : 2 * length : 2]) / 2
    out = layer_norm_reference(pooled, weight, bias, eps)
    if angles is not None:
        width = 2 * angles.shape[-1]
        a, b = out[..., 0:width:2].clone(), out[..., 1:width:2].clone()
        cos, sin = angles.double().cos(), angles.double().sin()
        out[..., 0:width:2] = a * cos - b * sin
        out[..., 1:width:2] = b * cos + a * sin
    return out.to(x.dtype)


def _rows_of_table(angles: Tensor | None, windows: Tensor | None, length: int) -> Tensor | None:
    return angles if angles is None or windows is None else angles[windows, :length]


_operation = Operation("pool_norm_rotate", reference)


@triton.jit
def sine_cosine(angle):  # type: ignore[no-untyped-def]
    """sin and cos of float32 angles up to 1e5 rad, each to about one unit in the last place.

    Subtracts a multiple n of pi/2 and evaluates polynomials on [-pi/4, pi/4] (Cephes). pi/2 is a sum of parts of 8
    bits, so that n * part and the differences are exact, fused or not. Triton's own sin and cos are as accurate but
    handle any angle, with a table in local memory.
    """
    n = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - n * 1.5703125
    r -= n * 4.825592041015625e-4
    r -= n * 1.2665987014770508e-6
    r -= n * 9.920935796805404e-10
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quadrant = n.to(tl.int32)
    swapped = (quadrant & 1) != 0
    sine, cosine = tl.where(swapped, cos, sin), tl.where(swapped, sin, cos)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@triton.jit(do_not_specialize=["x_window", "angles_window", "length"])
def _kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    angles,
    windows,
    out,
    x_window,
    x_position,
    angles_window,
    angles_token,
    length,
    channels,
    pairs,
    eps,
    ROTATE: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    window, token = row // length, row % length
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    first = x + window * x_window + 2 * token * x_position + channel
    pooled = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    pooled = 0.5 * (pooled + tl.load(first + x_position, mask=inside, other=0.0).to(tl.float32))
    values = normalize_row(pooled, inside, channels, eps, CENTER=True)
    values *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        if INDEXED:
            window = tl.load(windows + window).to(tl.int64)
        pair = tl.arange(0, BLOCK // 2)
        turns = angles + window * angles_window + token * angles_token
        # Pairs beyond the rotary width are rotated by 0, that is unchanged.
        sin, cos = sine_cosine(tl.load(turns + pair, mask=pair < pairs, other=0.0))
        a, b = tl.split(tl.reshape(values, (BLOCK // 2, 2)))
        values = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK,))
    tl.store(out + row * channels + channel, values.to(out.dtype.element_ty), mask=inside)


@_operation.implementation("triton")
def _triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, angles: Tensor | None, windows: Tensor | None
) -> Tensor:
    x = with_unit_stride(x)
    angles = None if angles is None else with_unit_stride(angles)
    batch, length, channels = x.shape[0], pooled_length(x.shape[1]), x.shape[2]
    out = x.new_empty(batch, length, channels)
    _kernel[(batch * length,)](
        x,
        weight.contiguous(),
        bias.contiguous(),
        angles,
        windows,
        out,
        *x.stride()[:2],
        *((0, 0) if angles is None else angles.stride()[:2]),
        length,
        channels,
        0 if angles is None else angles.shape[-1],
        eps,
        ROTATE=angles is not None,
        INDEXED=windows is not None,
        **row_blocks(channels),
    )
    return out


@_operation.implementation("native", lambda x, weight, bias, *_: native.misfit(x, weight, bias))
def _native(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, angles: Tensor | None, windows: Tensor | None
) -> Tensor:
    x = with_unit_stride(x)
    angles = None if angles is None else with_unit_stride(angles)
    if angles is not None and windows is not None:
        native.check_indices("windows", windows, "a table", len(angles))
    batch, length, channels = x.shape[0], pooled_length(x.shape[1]), x.shape[2]
    out = x.new_empty(batch, length, channels)
    workspace = torch.empty(thread_count(), channels + 16)
    native.call(
        "pool_norm_rotate",
        x,
        weight.contiguous(),
        bias.contiguous(),
        angles,
        None if windows is None else windows.contiguous(),
        out,
        workspace,
        workspace.shape[1],
        batch,
        length,
        channels,
        *x.stride()[:2],
        *((0, 0) if angles is None else angles.stride()[:2]),
        0 if angles is None else angles.shape[-1],
        eps,
        x.dtype,
    )
    return out


@_operation.implementation("torch")
def _torch(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, angles: Tensor | None, windows: Tensor | None
) -> Tensor:
    length = pooled_length(x.shape[1])
    angles = _rows_of_table(angles, windows, length)
    pooled = x[:, : 2 * length].float().unflatten(1, (length, 2)).mean(2)
    out = F.layer_norm(pooled, weight.shape, weight.float(), bias.float(), eps)
    if angles is not None:
        pairs = out[..., : 2 * angles.shape[-1]].unflatten(-1, (-1, 2))
        a, b = pairs.unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        pairs.copy_(torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1))
    return out.to(x.dtype)


def pool_norm_rotate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    angles: Tensor | None = None,
    windows: Tensor | None = None,
) -> Tensor:
    """Average pool by two over time, LayerNorm, then RoTE.

    x: [batch, positions, channels]; weight, bias: [channels]; angles: float32 radians up to 1e5 with 2 * dim <=
    channels, or None for models without RoTE (Audio Flamingo 3). Without `windows`, angles holds those of each row,
    [batch, pooled_length(positions), dim]; with it, angles is a table, [windows, at least pooled_length(positions),
    dim], and windows, [batch] int64, is the entry for each row. It must be within the table, which is not checked.
    Returns [batch, pooled_length(positions), channels] in the dtype of x; pooling, norm and rotation are float32.
    Raises ValueError when shapes do not fit.
    """
    if x.ndim != 3 or x.shape[1] < 2 or not weight.shape == bias.shape == x.shape[-1:]:
        raise ValueError(
            "expected x [batch, at least 2 positions, channels], weight and bias [channels], got "
            f"{tuple(x.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    check_tensors(x, FLOATING, x=x, weight=weight, bias=bias)
    check_tensors(x, FLOAT32, angles=angles)
    check_tensors(x, INT64, windows=windows)
    _check_angles(x, angles, windows)
    return _operation.on(x.device)(x, weight, bias, eps, angles, windows)


def _check_angles(x: Tensor, angles: Tensor | None, windows: Tensor | None) -> None:
    length = pooled_length(x.shape[1])
    if angles is None:
        if windows is not None:
            raise ValueError("windows are given without angles")
    elif windows is None:
        if angles.shape[:2] != (x.shape[0], length) or 2 * angles.shape[-1] > x.shape[-1]:
            raise ValueError(f"angles {tuple(angles.shape)} do not fit {tuple(x.shape)} pooled to {length} tokens")
    elif (
        angles.ndim != 3
        or angles.shape[1] < length
        or 2 * angles.shape[-1] > x.shape[-1]
        or windows.shape != x.shape[:1]
    ):
        raise ValueError(
            f"a table of angles {tuple(angles.shape)} with windows {tuple(windows.shape)} does not fit "
            f"{tuple(x.shape)} pooled to {length} tokens"
        )
