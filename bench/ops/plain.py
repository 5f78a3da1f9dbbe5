"""Each operation written naively in torch at the dtype of its inputs: the reference error of the accuracy rule.

An implementation may be at most twice as far from the float64 reference as these are (`accuracy.py`). They are written
for reading; nothing here is timed. The signatures are those of the public operations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.linear_fp8 import rounds_inputs
from ...kernels.linear_int3 import unpacked as unpacked_int3
from ...kernels.linear_int4 import unpacked as unpacked_int4
from ...kernels.linear_nf4 import unpacked as unpacked_nf4
from ...kernels.linear_nvfp4 import E8M0
from ...kernels.linear_nvfp4 import unpacked as unpacked_nvfp4
from ...kernels.log_mel import mel_filters
from ...kernels.packed_weight import Packed
from ...kernels.pages import gather_pages
from ...kernels.quantize_rows import E4M3
from ...kernels.quantize_rows import reference as quantize_rows_reference
from ...kernels.rotary import Rotation
from . import baselines


def log_mel(waveforms: Tensor, mel_bins: int, window_samples: int, dtype: torch.dtype) -> Tensor:
    """By torch.stft in float32."""
    filters = mel_filters(mel_bins, waveforms.device, torch.float32)
    return baselines.log_mel(waveforms, filters, torch.hann_window(400, device=waveforms.device), window_samples).to(
        dtype
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalized in float32, then scaled in the dtype of x."""
    wide = x.float()
    deviation = wide - wide.mean(-1, keepdim=True)
    return (deviation / (deviation.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalized in float32, then scaled in the dtype of x."""
    wide = x.float()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The sum in the dtype of x, then `layer_norm`."""
    hidden = residual + x
    return layer_norm(hidden, weight, bias), hidden


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum in the dtype of x, then `rms_norm`."""
    hidden = residual + x
    return rms_norm(hidden, weight), hidden


def pool_norm_rotate(x: Tensor, weight: Tensor, bias: Tensor, angles: Tensor, windows: Tensor) -> Tensor:
    """Pool and norm in the dtype of x, rotation in float64, as the reference model does."""
    turns = angles[windows, : x.shape[1] // 2].double()
    cos, sin = (turn(turns).repeat_interleave(2, -1) for turn in (torch.cos, torch.sin))
    return baselines.pool_norm_rotate(x, weight, bias, cos, sin)


def rotary(x: Tensor, rotation: Rotation) -> Tensor:
    """In float32, rounded at the end."""
    pairs = rotation.frequencies.numel()
    half = rotation.pairing == "half"
    first, second = (
        (slice(pairs), slice(pairs, 2 * pairs)) if half else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
    )
    angles = rotation.positions[..., None, None] * rotation.frequencies
    a, b, out = x[..., first].float(), x[..., second].float(), x.float().clone()
    out[..., first] = a * angles.cos() - b * angles.sin()
    out[..., second] = b * angles.cos() + a * angles.sin()
    return out.to(x.dtype)


def kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    rotation: Rotation,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Token by token through flat indices; int8 keys are rounded from float32."""
    keys = rotary(k if k_scales is None else k.float(), rotation)
    for x, cache, scales in ((keys, k_cache, k_scales), (v, v_cache, v_scales)):
        flat, rows = slots.flatten(), x.flatten(0, 1)
        if scales is None:
            cache.flatten(0, 1)[flat] = rows.to(cache.dtype)
        else:
            cache.flatten(0, 1)[flat], scales.flatten(0, 1)[flat] = quantize_rows_reference(rows)
    return rotary(q, rotation)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor,
    page_table: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Scores, softmax and sum as written, in the dtype of q, one sequence at a time."""
    outputs = []
    for b, length in enumerate(key_lengths.tolist()):
        keys, values = (
            x[b, :length] if page_table is None else _gathered(x, scales, page_table[b], length, q.dtype)
            for x, scales in ((k, k_scales), (v, v_scales))
        )
        grouped = q[b].unflatten(1, (keys.shape[1], -1))
        scores = torch.einsum("nhgd,khd->hgnk", grouped, keys) * q.shape[-1] ** -0.5
        if causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(length - q.shape[1] + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append(torch.einsum("hgnk,khd->nhgd", scores.softmax(-1), values).flatten(1, 2))
    return torch.stack(outputs)


def _gathered(cache: Tensor, scales: Tensor | None, pages: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    x = gather_pages(cache, pages, length)
    return x if scales is None else (x.float() * gather_pages(scales, pages, length)[..., None]).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One product added after the other in float32, rounded, then the bias: libraries sum in an order that GPUs do not.

    x: [rows, in]; weight: [out, in].
    """
    y = torch.zeros(len(x), len(weight), device=x.device)
    for k in range(x.shape[1]):
        y += x[:, k, None].float() * weight[:, k].float()
    return y.to(x.dtype) if bias is None else y.to(x.dtype) + bias


def linear_swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Two products as of `linear`, each rounded, then silu times."""
    return F.silu(linear(x, gate)) * linear(x, up)


def dense_weight(arguments: dict[str, Any], dtype: torch.dtype, part: str = "weight") -> Tensor:
    """The dequantized weight [out, in] of packed arguments, in `dtype`. part: "gate" or "up" of a pair."""
    weight: Packed = arguments[part]
    codes, scales, _ = weight
    if scales.dtype in (E4M3, E8M0):
        return unpacked_nvfp4(weight).to(dtype)
    if codes.dtype in (torch.int8, E4M3):
        by_group = codes.float().unflatten(1, (scales.shape[1] if scales.ndim == 2 else 1, -1))
        return (by_group * scales.float().reshape(len(codes), -1, 1)).flatten(1).to(dtype)
    if scales.dtype == torch.float32:
        return unpacked_nf4(weight).to(dtype)
    unpacked = unpacked_int3 if 8 * codes.shape[1] == 3 * arguments["x"].shape[1] else unpacked_int4
    return unpacked(weight).to(dtype)


def packed_linear(**arguments: Any) -> Tensor:
    """`linear` with the weight unpacked to the dtype of x."""
    x = arguments["x"]
    return linear(x, dense_weight(arguments, x.dtype), arguments.get("bias"))


def packed_swiglu(**arguments: Any) -> Tensor:
    """`linear_swiglu` with the weights unpacked to the dtype of x."""
    x = arguments["x"]
    return linear_swiglu(x, *(dense_weight(arguments, x.dtype, part) for part in ("gate", "up")))


def linear_norm(residual: Tensor, norm: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """`packed_linear`, then `add_rms_norm`."""
    return add_rms_norm(packed_linear(**arguments), residual, norm)


def rounded_linear(**arguments: Any) -> Tensor:
    """`packed_linear` of inputs rounded to int8, in groups where the scales have groups, and to the dtype of x."""
    return packed_linear(**{**arguments, "x": _rounded(arguments["x"], arguments["weight"])})


def rounded_swiglu(**arguments: Any) -> Tensor:
    """`packed_swiglu` of inputs rounded likewise."""
    return packed_swiglu(**{**arguments, "x": _rounded(arguments["x"], arguments["gate"])})


def fp8_linear(**arguments: Any) -> Tensor:
    """`packed_linear` of inputs rounded to e4m3, if the operation rounds them, and to the dtype of x."""
    return packed_linear(**{**arguments, "x": _rounded_to_e4m3(arguments["x"])})


def fp8_swiglu(**arguments: Any) -> Tensor:
    """`packed_swiglu` of inputs rounded likewise."""
    return packed_swiglu(**{**arguments, "x": _rounded_to_e4m3(arguments["x"])})


def _rounded_to_e4m3(x: Tensor) -> Tensor:
    if not rounds_inputs(x):
        return x
    codes, steps = quantize_rows_reference(x, E4M3)
    return (codes.float() * steps[..., None]).to(x.dtype)


def _rounded(x: Tensor, weight: Packed) -> Tensor:
    groups = weight.scales.shape[1] if weight.scales.ndim == 2 else 1
    codes, steps = quantize_rows_reference(x.unflatten(-1, (groups, -1)))
    return (codes.float() * steps[..., None]).flatten(-2).to(x.dtype)


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """One `where` for each branch."""
    scaled = torch.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])
    return torch.where(seen, scaled, logits)
