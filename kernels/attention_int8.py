"""Causal attention of many queries over an int8 cache, with products of integers: prefill with `attention="int8"`.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]          k[j] = ks[j] kc[j],  v[j] = vs[j] vc[j]

over the keys that query i sees, as in `attention.py`, but with both products in 8 bits. The codes kc and vc stay as the
cache has them (`kv_write.py`); queries and weights are rounded:

    q[i] ~ qs[i] qc[i],  |qc| <= 127                              one scale for each row
    s[j] = log2(e) scale * qs[i] ks[j] * (qc[i] . kc[j]) + log2(vs[j])
    w[j] = 2^(s[j] - m),  m the largest s[j] in a block           wc[j] = round(n w[j]),  n = 255 or 127
    out[i] = sum_blocks 2^(m - M) / n sum_j wc[j] vc[j]  /  sum_blocks 2^(m - M) sum_j w[j] / vs[j],  M the largest m

The scale of a value is part of its weight, so values need no other scale. The sum of weights is of unrounded ones: a
token with a large weight and small values, as the first one often is, would otherwise change it by its rounding. Blocks
begin at multiples of their size, and a block's largest score is that of the keys which the row sees, so the result of a
row does not depend on how the prompt is divided into chunks.

Keys need no smoothing (subtraction of their mean): their codes are given. The error of a score is that of the query, at
most 1/254 of its largest channel, times the key; a part of the keys that all share cancels in the softmax.

The operation is that of `attention.py`, told that it may round. The native kernel takes blocks of 256 keys and
multiplies bytes by VNNI, AMX or ARM's dot products. AVX2 has no such instruction: it multiplies 15-bit queries and
weights, with hardly any error, and without being asked if the queries are bfloat16. The Triton kernel multiplies
queries and keys in bytes, and values by weights in the dtype of q, as transposing bytes would take longer than it
saves. Torch and the other native levels round nothing.
FLOPs and bytes: as `attention.py`.
Source: Zhang et al. 2024, arXiv:2410.02367 (SageAttention: attention in 8 bits).
"""

import torch
from torch import Tensor

from .attention import _operation, check_attention


def attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor,
    page_table: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of q, rotated, over an int8 cache, with products of integers.

    q: [batch, queries, heads, head_dim], float32, bfloat16 or float16, the last tokens of their sequences; k, v: pools
    [pages, page_size, kv_heads, head_dim] int8; k_scales, v_scales: [pages, page_size, kv_heads] float32; page_table:
    [batch, max_pages] int; key_lengths: [batch] int, at least the number of queries. scale defaults to
    head_dim ** -0.5. Returns a tensor like q. Raises ValueError when shapes or dtypes do not fit.
    """
    check_attention(q, k, v, key_lengths, page_table, k_scales, v_scales)
    if k.dtype != torch.int8:
        raise ValueError(f"attention_int8 takes keys and values in int8, got {k.dtype}")
    return _operation.on(q.device)(
        q,
        k,
        v,
        True,
        q.shape[-1] ** -0.5 if scale is None else scale,
        key_lengths,
        page_table,
        k_scales,
        v_scales,
        None,
        None,
        True,
    )
