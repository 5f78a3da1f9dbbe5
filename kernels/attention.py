"""Attention over many queries: bidirectional with key lengths (encoder), or causal behind a prefix (prefill).

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]          over the keys j that query i may see

Without `causal` a query sees the first key_lengths[b] keys of its sequence. With `causal` the queries are the LAST
ones of their sequence: of key_lengths[b] keys, query i of n sees those up to key_lengths[b] - n + i. Query head h reads
KV head h // (heads / kv_heads) (GQA). Keys and values are dense, [batch, keys, kv_heads, head_dim], or paged
(`page_table` given, see `pages.py`). `rotation` turns the queries on the way in; keys in a cache are already turned
(`kv_write.py`), dense keys are turned by `key_rotation`. So RoPE, the report's RoTE (positions -2 pi * seconds,
interleaved pairs) and no rotation are one operation.

Operations: 4 * head_dim per visible query-key pair and head, half of them in each product. Bytes: q and out once, k
and v once per query tile.
Source: Vaswani et al. 2017; Ainslie et al. 2023 (GQA); Goel et al. 2024, arXiv:2410.12109 (RoTE in attention).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import Operation
from .pages import gather_pages
from .rotary import Rotation, rotary


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
) -> Tensor:
    """The specification: float64, one sequence and one query head at a time."""
    out = torch.empty_like(q)
    for b, (keys, values) in enumerate(_sequences(q, k, v, key_lengths, page_table)):
        visible = visible_keys(q.shape[1], keys.shape[0], causal, q.device)
        for h in range(q.shape[2]):
            kv_head = h // (q.shape[2] // keys.shape[1])
            scores = q[b, :, h].double() @ keys[:, kv_head].double().T * scale
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            out[b, :, h] = (weights @ values[:, kv_head].double()).to(q.dtype)
    return out


_operation = Operation("attention", reference)


@_operation.implementation("torch")
def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
) -> Tensor:
    if page_table is None and not causal:
        mask = None
        if key_lengths is not None and int(key_lengths.min()) < k.shape[1]:
            mask = (torch.arange(k.shape[1], device=q.device) < key_lengths[:, None])[:, None, None, :]
        return _grouped_attention(q, k, v, mask, scale)
    outputs = []
    for b, (keys, values) in enumerate(_sequences(q, k, v, key_lengths, page_table)):
        # Without a prefix the fused kernel skips what is masked by itself, which halves its work; but it masks with
        # -inf before it scales, which only a positive scale survives.
        whole = causal and q.shape[1] == keys.shape[0] and scale > 0
        visible = None if whole else visible_keys(q.shape[1], keys.shape[0], causal, q.device)
        outputs.append(_grouped_attention(q[b : b + 1], keys[None], values[None], visible, scale, whole))
    return torch.cat(outputs)


def _grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> Tensor:
    # The query heads of one KV head become SDPA's heads and the KV heads its batch, so that the keys are broadcast over
    # the group with a stride of zero instead of being repeated in memory.
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    if group > 1 and batch > 1:
        masks = [None] * batch if mask is None else mask.expand(batch, -1, -1, -1).split(1)
        rows = zip(q.split(1), k.split(1), v.split(1), masks, strict=True)
        return torch.cat([_grouped_attention(*row, scale) for row in rows])
    if group == 1:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=is_causal)
        return out.transpose(1, 2)
    grouped = q[0].unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
    keys, values = (x[0].transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale, is_causal=is_causal)
    return out.permute(2, 0, 1, 3).reshape(1, queries, heads, head_dim)


def visible_keys(queries: int, keys: int, causal: bool, device: torch.device) -> Tensor:
    """[queries, keys] bool: which keys each query sees; causal queries are the last of the sequence."""
    if not causal:
        return torch.ones(queries, keys, dtype=torch.bool, device=device)
    last = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) <= last[:, None]


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, page_table: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each sequence, [length, kv_heads, head_dim], cut to its length."""
    lengths = [k.shape[1]] * q.shape[0] if key_lengths is None else key_lengths.tolist()
    if page_table is None:
        return [(k[b, :length], v[b, :length]) for b, length in enumerate(lengths)]
    return [
        (gather_pages(k, pages, length), gather_pages(v, pages, length))
        for pages, length in zip(page_table, lengths, strict=True)
    ]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    rotation: Rotation | None = None,
    key_rotation: Rotation | None = None,
) -> Tensor:
    """Attention of q over dense or paged keys and values.

    q: [batch, queries, heads, head_dim]; k, v: [batch, keys, kv_heads, head_dim], or with `page_table` ([batch,
    max_pages] int) pools [pages, page_size, kv_heads, head_dim]. key_lengths: [batch] int, required with pages, at
    least 1, and at least the number of queries when causal. scale defaults to head_dim ** -0.5.
    Returns like q; softmax in float32. Raises ValueError when shapes do not fit.
    """
    check_attention(q, k, v, key_lengths, page_table)
    if causal and page_table is None and k.shape[1] < q.shape[1]:
        raise ValueError(f"causal queries are the last of their sequence, got {q.shape[1]} queries, {k.shape[1]} keys")
    if rotation is not None:
        q = rotary(q, rotation)
    if key_rotation is not None:
        if page_table is not None:
            raise ValueError("keys in a paged cache are rotated when they are written, not by attention")
        k = rotary(k, key_rotation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _operation.on(q.device)(q, k, v, causal, scale, key_lengths, page_table)


def check_attention(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, page_table: Tensor | None) -> None:
    """Raise ValueError unless the shapes are those of one attention problem."""
    alike = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[-1] == k.shape[-1]
    if not alike or q.shape[2] % k.shape[2] or (page_table is None and k.shape[0] != q.shape[0]):
        raise ValueError(
            "attention takes q [batch, queries, heads, head_dim] and k, v alike with kv_heads dividing heads, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if page_table is not None and (key_lengths is None or page_table.shape[:1] != q.shape[:1]):
        raise ValueError(
            "paged keys need key_lengths, and one row of the page table for each of the "
            f"{q.shape[0]} sequences, got a table of shape {tuple(page_table.shape)}"
        )
    if key_lengths is not None and key_lengths.shape != q.shape[:1]:
        raise ValueError(f"key_lengths must have the shape {tuple(q.shape[:1])}, got {tuple(key_lengths.shape)}")
