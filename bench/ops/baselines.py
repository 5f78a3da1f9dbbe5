"""Baselines of the kernels: each operation as it is usually written in torch.

They follow transformers with its best settings: SDPA on a static cache, rotation in the dtype of the activations,
logits filtered by sorting. Other libraries are in `libraries.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def log_mel(waveforms: Tensor, filters: Tensor, window: Tensor, window_samples: int) -> Tensor:
    """Whisper's features by torch.stft over the whole padded window: [batch, mel_bins, frames] float32.

    filters: [201, mel_bins]; window: [400], the Hann window.
    """
    x = F.pad(waveforms, (0, window_samples - waveforms.shape[-1]))
    spectrum = torch.stft(x, 400, 160, window=window, center=True, pad_mode="reflect", return_complex=True)
    mel = filters.T @ spectrum[..., :-1].abs().square()
    logs = mel.clamp(min=1e-10).log10()
    return (torch.maximum(logs, logs.amax((-2, -1), keepdim=True) - 8) + 4) / 4


def conv_stem(mel: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor) -> Tensor:
    """Two convolutions with GELU, then positions. Shapes as in `kernels/conv_stem.py`."""
    h = F.gelu(F.conv1d(mel, weight1, bias1, padding=1))
    h = F.gelu(F.conv1d(h, weight2, bias2, stride=2, padding=1)).permute(0, 2, 1)
    return h + positions[: h.shape[1]]


def pool_norm_rotate(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Average pool, LayerNorm, then rotation of neighbouring channels in float64, the reference model's dtype for it.

    x: [batch, positions, channels]; cos, sin: [batch, positions // 2, rotated channels] float64, each value twice.
    """
    x = F.layer_norm(F.avg_pool1d(x.permute(0, 2, 1), 2, stride=2).permute(0, 2, 1), weight.shape, weight, bias)
    turned, rest = x[..., : cos.shape[-1]].double(), x[..., cos.shape[-1] :]
    swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    return torch.cat(((turned * cos + swapped * sin).to(x.dtype), rest), dim=-1)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin in the dtype of x. cos, sin: [batch, time, 1, head_dim], each half alike."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for neighbouring channels. cos, sin: [batch, time, 1, head_dim], each value twice in a row."""
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """Attention of q [batch, queries, heads, head_dim] over a static cache [batch, kv_heads, keys, head_dim]."""
    grouped = q.shape[2] != k.shape[1]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


def repetition_penalty(logits: Tensor, seen_ids: Tensor, penalty: Tensor) -> Tensor:
    """Gather the scores of the ids seen, [batch, n], penalize them and scatter them back into a copy."""
    scores = logits.gather(1, seen_ids)
    scores = torch.where(scores < 0, scores * penalty[:, None], scores / penalty[:, None])
    return logits.scatter(1, seen_ids, scores)


def draw_nucleus(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Top-p over the whole sorted vocabulary, then the inverse of the cumulative distribution at `uniform`."""
    scaled, order = (logits / temperature[:, None]).sort(dim=-1, descending=True)
    probabilities = scaled.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    kept = probabilities.masked_fill(cumulative - probabilities >= top_p[:, None], 0.0)
    return _draw(kept, order, uniform)


def draw_top_k(logits: Tensor, temperature: Tensor, top_k: int, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Top-k by selection instead of a sort, then top-p and the draw among those k."""
    scaled, order = (logits / temperature[:, None]).topk(top_k, dim=-1)
    probabilities = scaled.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    kept = probabilities.masked_fill(cumulative - probabilities >= top_p[:, None], 0.0)
    return _draw(kept, order, uniform)


def _draw(kept: Tensor, order: Tensor, uniform: Tensor) -> Tensor:
    cumulative = kept.cumsum(-1)
    choice = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    return order.gather(1, choice.clamp_max(order.shape[-1] - 1)).squeeze(1)
