"""Rotate the new queries and keys, and write keys and values into the pages of the KV cache.

    q_out = rotary(q);  k_cache[slot] = rotary(k);  v_cache[slot] = v          slot = page_slots(...)

Keys are stored rotated, so attention reads them as they are. One pass reads q, k, v and writes as much: at full size
2 * (3584 + 2 * 512) * 2 bytes a token and layer in bf16.
Source: the paged layout is that of Kwon et al. 2023 (PagedAttention).
"""

from torch import Tensor

from .dispatch import Operation
from .rotary import Rotation, check_rotation, rotary
from .rotary import reference as rotary_reference


def reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, rotation: Rotation
) -> Tensor:
    """The specification: token by token."""
    keys = rotary_reference(k, rotation)
    page_size = k_cache.shape[1]
    for b, row in enumerate(slots.tolist()):
        for t, slot in enumerate(row):
            k_cache[slot // page_size, slot % page_size] = keys[b, t].to(k_cache.dtype)
            v_cache[slot // page_size, slot % page_size] = v[b, t].to(v_cache.dtype)
    return rotary_reference(q, rotation)


_operation = Operation("kv_write", reference)


@_operation.implementation("torch")
def _torch(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, rotation: Rotation
) -> Tensor:
    flat = slots.flatten()
    k_cache.flatten(0, 1).index_copy_(0, flat, rotary(k, rotation).flatten(0, 1).to(k_cache.dtype))
    v_cache.flatten(0, 1).index_copy_(0, flat, v.flatten(0, 1).to(v_cache.dtype))
    return rotary(q, rotation)


def kv_write(
    q: Tensor, k: Tensor, v: Tensor, *, k_cache: Tensor, v_cache: Tensor, slots: Tensor, rotation: Rotation
) -> Tensor:
    """Write the rotated keys and the values INTO `k_cache` and `v_cache`; return the rotated queries.

    q: [batch, time, heads, head_dim]; k, v: [batch, time, kv_heads, head_dim]; caches: [pages, page_size, kv_heads,
    head_dim], contiguous; slots: [batch, time] int64 from `page_slots`, all different.
    Raises ValueError when shapes do not fit.
    """
    if k.shape != v.shape or k.shape[2:] != k_cache.shape[2:] or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit caches of shape {tuple(k_cache.shape)} and "
            f"{tuple(v_cache.shape)}"
        )
    if slots.shape != k.shape[:2]:
        raise ValueError(f"slots must have the shape {tuple(k.shape[:2])}, got {tuple(slots.shape)}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("the caches are written in place and must be contiguous")
    check_rotation(q, rotation)
    check_rotation(k, rotation)
    return _operation.on(q.device)(q, k, v, k_cache, v_cache, slots, rotation)
