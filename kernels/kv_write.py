"""Rotate the new queries and keys, and write keys and values into the pages of the KV cache.

    q_out = rotary(q);  k_cache[slot] = rotary(k);  v_cache[slot] = v          slot = page_slots(...)

Keys are stored rotated, so attention reads them as they are. A cache in int8 or in the 8-bit float e4m3 (`e4m3.py`)
stores, for each token and head x (keys after rotation), codes and a float32 scale:

    scale = max |x| / largest;  stored = round(x / scale), half to even, within +-largest;  x is read as stored * scale

with 127 as the largest of int8 and 448 of e4m3, and round to integers or to numbers in e4m3. A vector of zeros has the
scale 0. `int4_cache.py` defines an int4 cache, which stores keys without the bias `k_bias`.

The biases of q, k and v are not added here: the products that compute q, k and v add them in their epilogue (cuBLAS and
every quantized product do), so fusing them here would save no pass over memory.

Memory-bound: one pass reads q, k, v and writes as much, at full size 2 * (3584 + 2 * 512) * 2 bytes per token and layer
in bf16 (18 KiB; 17 KiB with codes of 8 bits). The Triton kernel does so in one launch, and reads the table of cosines
(512 bytes per token, see `rotary.py`) from the L2 cache; a program handles four query heads, or one key head and its
value head.
Source: the paged layout is that of Kwon et al. 2023 (PagedAttention).
"""

import torch
from torch import Tensor

from . import native
from .arguments import FLOAT32, FLOATING, INT64, check_tensors
from .dispatch import Operation
from .e4m3 import narrowed, readable
from .int4_cache import DTYPE as INT4
from .int4_cache import HEAD_DIMS, is_int4, quantize_int4, walsh_hadamard_rows
from .pages import QUANTIZED
from .quantize_rows import E4M3
from .quantize_rows import reference as quantize_rows
from .rotary import (
    Rotation,
    check_rotation,
    load_turned,
    load_turns,
    native_misfit,
    rotary,
    rotation_config,
    token_rows,
)
from .rotary import reference as rotary_reference
from .strides import with_unit_stride
from .triton_language import tl, triton


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    slots: Tensor,
    rotation: Rotation,
    k_bias: Tensor | None = None,
) -> Tensor:
    """The specification: token by token."""
    keys = rotary_reference(k.double() if k_bias is None else k.double() - k_bias.double(), rotation)
    page_size = k_cache.shape[1]
    for x, cache, scales in ((keys, k_cache, k_scales), (v, v_cache, v_scales)):
        for b, row in enumerate(slots.tolist()):
            for t, slot in enumerate(row):
                page, offset = divmod(slot, page_size)
                if scales is None:
                    cache[page, offset] = x[b, t].to(cache.dtype)
                else:
                    cache[page, offset], scales[page, offset] = _quantized(x[b, t], cache.dtype)
    return rotary_reference(q, rotation)


def _quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of x [..., head_dim] in a cache of `dtype`."""
    return quantize_int4(x) if dtype == INT4 else quantize_rows(x, dtype)


_operation = Operation("kv_write", reference)


@triton.jit
def _store_int4(  # type: ignore[no-untyped-def]
    x, cache, scales, rows, exists, HEAD_DIM: tl.constexpr, STAGES: tl.constexpr, BLOCK_TOKENS: tl.constexpr
):
    """Like `_store`, in four bits; see `int4_cache.py`."""
    x = walsh_hadamard_rows(x, BLOCK_TOKENS, HEAD_DIM, STAGES)
    step = tl.max(tl.abs(x), 1, keep_dims=True) / 8  # a power of two, as every factor here: exact
    tl.store(scales + rows, step / (2 * HEAD_DIM), mask=exists)
    quotient = tl.div_rn(x, tl.where(step > 0, step, 1.0).broadcast_to(x.shape))
    codes = tl.minimum(tl.maximum(tl.floor(quotient) + 8, 0.0), 15.0).to(tl.uint8)
    low, high = tl.split(tl.permute(tl.reshape(codes, (BLOCK_TOKENS, 2, HEAD_DIM // 2)), (0, 2, 1)))
    at = cache + rows * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)[None, :]
    tl.store(at, low | (high << 4), mask=exists)


@triton.jit
def _store(x, cache, scales, rows, channels, exists, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write one head of some tokens. x: [tokens, channels] float32, 0 beyond HEAD_DIM; rows: [tokens, 1] int64, the
    index of each (slot, head) in the cache; exists: [tokens, 1], false past the last token."""
    if scales is not None:
        # IEEE division and rounding, so that every implementation stores the same codes.
        largest: tl.constexpr = 127.0 if cache.dtype.element_ty == tl.int8 else 448.0
        scale = tl.div_rn(tl.max(tl.abs(x), 1, keep_dims=True), largest)
        tl.store(scales + rows, scale, mask=exists)
        quotient = tl.div_rn(x, tl.where(scale > 0, scale, 1.0).broadcast_to(x.shape))
        x = tl.minimum(tl.maximum(quotient, -largest), largest)
        if cache.dtype.element_ty == tl.int8:
            x = (x + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to an integer, half to even
    tl.store(cache + rows * HEAD_DIM + channels, narrowed(x, cache), mask=exists & (channels < HEAD_DIM))


@triton.jit(do_not_specialize=["tokens", "time"])
def _kv_write_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    q_out,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    slots,
    cos,
    sin,
    k_bias,
    q_batch,
    q_time,
    q_head,
    k_batch,
    k_time,
    k_head,
    v_batch,
    v_time,
    v_head,
    tokens,
    time,
    heads,
    kv_heads,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    INT4_STAGES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    exists = token < tokens
    mask = exists & (channel < HEAD_DIM)
    turn_cos, turn_sin = load_turns(cos, sin, token, channel, mask, PAIRS, HALF)
    part = tl.program_id(1)
    if part < kv_heads:
        slot = tl.load(slots + token, mask=exists, other=0).to(tl.int64)
        key_rows = token_rows(token, time, k_batch, k_time) + part * k_head
        key = load_turned(k, key_rows, channel, mask, turn_cos, turn_sin, PAIRS, HALF)
        if k_bias is not None:
            bias_rows = token * 0 + part * HEAD_DIM
            key -= load_turned(k_bias, bias_rows, channel, mask, turn_cos, turn_sin, PAIRS, HALF)
        value_rows = token_rows(token, time, v_batch, v_time) + part * v_head
        value = tl.load(v + value_rows + channel, mask=mask, other=0.0).to(tl.float32)
        rows = slot * kv_heads + part
        if INT4_STAGES > 0:
            _store_int4(key, k_cache, k_scales, rows, exists, HEAD_DIM, INT4_STAGES, BLOCK_TOKENS)
            _store_int4(value, v_cache, v_scales, rows, exists, HEAD_DIM, INT4_STAGES, BLOCK_TOKENS)
        else:
            _store(key, k_cache, k_scales, rows, channel, exists, HEAD_DIM)
            _store(value, v_cache, v_scales, rows, channel, exists, HEAD_DIM)
    else:
        query_rows = token_rows(token, time, q_batch, q_time)
        first = (part - kv_heads) * BLOCK_HEADS
        for head in range(first, tl.minimum(first + BLOCK_HEADS, heads)):
            turned = load_turned(q, query_rows + head * q_head, channel, mask, turn_cos, turn_sin, PAIRS, HALF)
            to = q_out + (token.to(tl.int64) * heads + head) * HEAD_DIM + channel
            tl.store(to, turned.to(q_out.dtype.element_ty), mask=mask)


@_operation.implementation("triton")
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    slots: Tensor,
    rotation: Rotation,
    k_bias: Tensor | None = None,
) -> Tensor:
    q, k, v = map(with_unit_stride, (q, k, v))
    batch, time, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    out = q.new_empty(q.shape)
    if q.numel() == 0:
        return out
    cos, sin = rotation.cos_sin
    config = rotation_config(batch * time, q.device)
    parts = kv_heads + triton.cdiv(heads, config.blocks["BLOCK_HEADS"])
    _kv_write_kernel[(triton.cdiv(batch * time, config.blocks["BLOCK_TOKENS"]), parts)](
        q,
        k,
        v,
        out,
        readable(k_cache),
        readable(v_cache),
        k_scales,
        v_scales,
        slots.contiguous(),
        cos,
        sin,
        None if k_bias is None else k_bias.contiguous(),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        batch * time,
        time,
        heads,
        kv_heads,
        HEAD_DIM=head_dim,
        PAIRS=cos.shape[-1],
        HALF=rotation.pairing == "half",
        INT4_STAGES=head_dim.bit_length() - 1 if is_int4(k_cache) else 0,
        BLOCK_CHANNELS=triton.next_power_of_2(head_dim),
        **config.options(),
    )
    return out


def _misfit(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, *_: object) -> str | None:
    return native_misfit(q, k, v) or (None if k_cache.dtype in QUANTIZED else native.misfit(k_cache))


@_operation.implementation("native", _misfit)
def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    slots: Tensor,
    rotation: Rotation,
    k_bias: Tensor | None = None,
) -> Tensor:
    k, v = map(with_unit_stride, (k, v))
    native.check_indices("slots", slots, "caches", k_cache.shape[0] * k_cache.shape[1])
    cos, sin = rotation.cos_sin
    caches = (k, v, k_cache, v_cache, k_scales, v_scales)
    positions = (slots.contiguous(), cos, sin)
    sizes = (*k.shape, cos.shape[-1], rotation.pairing == "half", *k.stride()[:3], *v.stride()[:3], k.dtype)
    if is_int4(k_cache):
        bias = None if k_bias is None else k_bias.contiguous()
        native.call("kv_write_int4", *caches, bias, *positions, *sizes)
    else:
        e4m3 = k_cache.dtype == E4M3
        native.call("kv_write", *caches, *positions, *sizes, k.dtype if k_scales is not None else k_cache.dtype, e4m3)
    return rotary(q, rotation)


@_operation.implementation("torch")
def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    slots: Tensor,
    rotation: Rotation,
    k_bias: Tensor | None = None,
) -> Tensor:
    flat = slots.flatten()
    # Keys to be quantized are not rounded to their own dtype first.
    if k_bias is not None:
        k = k.float() - k_bias.float()
    keys = rotary(k if k_scales is None else k.float(), rotation)
    for x, cache, scales in ((keys, k_cache, k_scales), (v, v_cache, v_scales)):
        if scales is None:
            cache.flatten(0, 1).index_copy_(0, flat, x.flatten(0, 1).to(cache.dtype))
        else:
            stored, scale = _quantized(x.flatten(0, 1), cache.dtype)
            cache.view(torch.uint8).flatten(0, 1).index_copy_(0, flat, stored.view(torch.uint8))
            scales.flatten(0, 1).index_copy_(0, flat, scale)
    return rotary(q, rotation)


def kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    rotation: Rotation,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    k_bias: Tensor | None = None,
) -> Tensor:
    """Write the rotated keys and the values INTO `k_cache` and `v_cache`; return the rotated queries.

    q: [batch, time, heads, head_dim]; k, v: [batch, time, kv_heads, head_dim]; caches: [pages, page_size, kv_heads,
    head_dim], contiguous, or of int4 [..., head_dim / 2] uint8; slots: [batch, time] int64 from `page_slots`, all
    different. With caches in int8, float8_e4m3fn or int4, k_scales and v_scales, [pages, page_size, kv_heads] float32
    and contiguous, are also written. k_bias: [kv_heads, head_dim] of the dtype of k, subtracted from the keys of an
    int4 cache before rotation; see `int4_cache.KeyBias`.
    Raises ValueError when shapes or dtypes do not fit.
    """
    row = (*k.shape[2:3], k.shape[-1] // (2 if is_int4(k_cache) else 1))
    if k.shape != v.shape or k_cache.shape[2:] != row or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit caches of shape {tuple(k_cache.shape)} and "
            f"{tuple(v_cache.shape)} of {k_cache.dtype}"
        )
    if slots.shape != k.shape[:2]:
        raise ValueError(f"slots must have the shape {tuple(k.shape[:2])}, got {tuple(slots.shape)}")
    for cache, scales in ((k_cache, k_scales), (v_cache, v_scales)):
        _check_scales(cache, scales)
        if not (cache.is_contiguous() and (scales is None or scales.is_contiguous())):
            raise ValueError("the caches and their scales are written in place and must be contiguous")
    check_tensors(q, FLOATING, k=k, v=v)
    check_tensors(q, FLOATING | QUANTIZED, k_cache=k_cache, v_cache=v_cache)
    check_tensors(q, INT64, slots=slots)
    check_tensors(q, FLOAT32, k_scales=k_scales, v_scales=v_scales)
    check_rotation(q, rotation)
    check_rotation(k, rotation)
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(f"both caches must have one dtype, got {k_cache.dtype} and {v_cache.dtype}")
    if is_int4(k_cache) and k.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"an int4 cache takes heads of {', '.join(map(str, HEAD_DIMS))} channels, got {k.shape[-1]}")
    if k_bias is not None and (not is_int4(k_cache) or k_bias.shape != k.shape[2:] or k_bias.dtype != k.dtype):
        raise ValueError(
            f"k_bias is {tuple(k.shape[2:])} {k.dtype} for an int4 cache, got {k_bias.dtype} {k_bias.shape}"
        )
    return _operation.on(q.device)(q, k, v, k_cache, v_cache, k_scales, v_scales, slots, rotation, k_bias)


def _check_scales(cache: Tensor, scales: Tensor | None) -> None:
    if (cache.dtype in QUANTIZED) != (scales is not None):
        raise ValueError(f"scales belong to fp8, int4 and int8 caches and to no others, got a cache of {cache.dtype}")
    if scales is not None and (scales.shape != cache.shape[:3] or scales.dtype != torch.float32):
        raise ValueError(
            f"scales must be float32 of the shape {tuple(cache.shape[:3])}, got {scales.dtype} {tuple(scales.shape)}"
        )
