"""Attention of the newest few tokens of each sequence over its whole paged KV cache: the decode step.

    out[b, i] = softmax_j(scale * q[b, i] . k[b, j]) v[b, j]          j <= key_lengths[b] - n + i

for n = 1 .. 8 new tokens a sequence (more than one when drafts are verified). It is the causal attention of
`attention.py`, kept apart because its limit is another: each key and value is used by a handful of rows only, so the
time is that of reading the cache, 2 * kv_heads * head_dim * bytes per cached token and layer (2 KiB in bf16 at full
size: 92 MB a layer at 45 000 tokens).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import check_attention, visible_keys
from .attention import reference as attention_reference
from .dispatch import Operation
from .pages import gather_pages

MAX_NEW_TOKENS = 8


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor, page_table: Tensor) -> Tensor:
    """The specification: causal attention in float64."""
    return attention_reference(q, k, v, True, scale, key_lengths, page_table)


_operation = Operation("decode_attention", reference)


@_operation.implementation("torch")
def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor, page_table: Tensor) -> Tensor:
    batch, new_tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # The rows of a group and its new tokens share each KV head, so they form one small matrix against it.
    rows = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    outputs = []
    for b, length in enumerate(key_lengths.tolist()):
        keys, values = (gather_pages(cache, page_table[b], length).transpose(0, 1) for cache in (k, v))
        mask = None
        if new_tokens > 1:
            mask = visible_keys(new_tokens, length, True, q.device).repeat(heads // kv_heads, 1)
        # With a batch dimension, which its fused kernel asks for.
        out = F.scaled_dot_product_attention(rows[b : b + 1], keys[None], values[None], attn_mask=mask, scale=scale)
        outputs.append(out)
    out = torch.cat(outputs).unflatten(2, (-1, new_tokens)).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, new_tokens, heads, head_dim)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_lengths: Tensor, page_table: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of the last n tokens of each sequence over its cache, in which they already are.

    q: [batch, n, heads, head_dim] with n <= MAX_NEW_TOKENS, rotated; k, v: pools [pages, page_size, kv_heads,
    head_dim]; key_lengths: [batch] int, tokens in the cache, the new ones included; page_table: [batch, max_pages] int.
    Returns like q; softmax in float32. Raises ValueError when shapes do not fit.
    """
    check_attention(q, k, v, key_lengths, page_table)
    if not 1 <= q.shape[1] <= MAX_NEW_TOKENS:
        raise ValueError(f"decode_attention takes 1 to {MAX_NEW_TOKENS} new tokens, got {q.shape[1]}; use attention")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _operation.on(q.device)(q, k, v, scale, key_lengths, page_table)
