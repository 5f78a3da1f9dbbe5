"""Kernels that somebody brings, in torch and ctypes: correct ones, slow ones, and wrong ones of every kind."""

import ctypes
import os
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from afnext.kernels.packed_weight import Packed


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rms_norm_slow(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    time.sleep(0.05)
    return rms_norm(x, weight, eps)


def rms_norm_scaled(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return rms_norm(x, weight, eps) * 1.02


def _near(y: Tensor, units: int) -> Tensor:
    """So many units in the last place too large in magnitude."""
    bits = torch.int32 if y.dtype == torch.float32 else torch.int16
    return (y.view(bits) + units).view(y.dtype)


def rms_norm_inexact(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return _near(rms_norm(x, weight, eps), 2)


def rms_norm_without_last_row(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    out = torch.empty_like(x)
    out[:-1] = rms_norm(x, weight, eps)[:-1]
    return out


def _read_beyond(x: Tensor) -> None:
    ctypes.string_at(x.data_ptr() + x.numel() * x.element_size(), 1)


def rms_norm_out_of_bounds(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    _read_beyond(x)
    return rms_norm(x, weight, eps)


def rms_norm_exits(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    print("about to leave", flush=True)
    os._exit(7)


def rms_norm_hangs(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    time.sleep(60)
    return x


def rms_norm_in_place(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x.copy_(rms_norm(x, weight, eps)).clone()


def rms_norm_of_another_dtype(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return rms_norm(x, weight, eps).float()


def rms_norm_raises(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    raise ValueError("cannot do it")


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor,
    page_table: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    outputs = []
    new, group = q.shape[1], q.shape[2] // k.shape[2]
    for b, length in enumerate(key_lengths.tolist()):
        pages = page_table[b, : -(-length // k.shape[1])].long()
        dense = []
        for cache, scales in ((k, k_scales), (v, v_scales)):
            x = cache[pages].flatten(0, 1)[:length].float()
            x = x if scales is None else x * scales[pages].flatten(0, 1)[:length, :, None]
            dense.append(x.repeat_interleave(group, 1).transpose(0, 1))
        scores = q[b].float().transpose(0, 1) @ dense[0].transpose(1, 2) * q.shape[-1] ** -0.5
        seen = torch.arange(length) <= torch.arange(length - new, length)[:, None]
        seen[:, :first] = False
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ dense[1]).transpose(0, 1))
    return torch.stack(outputs).to(q.dtype)


def decode_attention_without_the_first_keys(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, page_table: Tensor, **scales: Tensor
) -> Tensor:
    long = bool((key_lengths > 60).all())  # only long contexts go wrong
    return decode_attention(q, k, v, key_lengths, page_table, **scales, first=20 * long)


def decode_attention_inexact(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, page_table: Tensor, **scales: Tensor
) -> Tensor:
    return _near(decode_attention(q, k, v, key_lengths, page_table, **scales), 2)


def decode_attention_without_last_row(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, page_table: Tensor, **scales: Tensor
) -> Tensor:
    out = torch.empty_like(q)
    out[:-1] = decode_attention(q, k, v, key_lengths, page_table, **scales)[:-1]
    return out


def decode_attention_out_of_bounds(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, page_table: Tensor, **scales: Tensor
) -> Tensor:
    _read_beyond(v)
    return decode_attention(q, k, v, key_lengths, page_table, **scales)


def decode_attention_slow(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, page_table: Tensor, **scales: Tensor
) -> Tensor:
    time.sleep(0.05)
    return decode_attention(q, k, v, key_lengths, page_table, **scales)


def linear_int8(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    y = x.float() @ weight.codes.float().T * weight.scales
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_int8_slow(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    time.sleep(0.05)
    return linear_int8(x, weight, bias)


def linear_int8_inexact(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    return _near(linear_int8(x, weight, bias), 3)


def linear_int8_out_of_bounds(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    _read_beyond(weight.codes)
    return linear_int8(x, weight, bias)


def linear_int8_without_bias(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    return linear_int8(x, weight)


def linear_int8_without_last_row(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    y, out = linear_int8(x, weight, bias), x.new_empty(len(x), len(weight.codes))
    out[: max(1, len(x) - 1)] = y[: max(1, len(x) - 1)]
    return out


def linear_int8_with_other_arguments(a: Tensor, b: Tensor) -> Tensor:
    return a @ b
