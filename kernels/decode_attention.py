"""Attention of the newest few tokens of each sequence over its whole paged KV cache: the decode step.

    out[b, i] = softmax_j(scale * q[b, i] . k[b, j]) v[b, j]          j <= key_lengths[b] - n + i

for n = 1 .. 8 new tokens per sequence (more than one when speculative tokens are verified). This is the causal
attention of `attention.py`, separate because it is bound by memory: only a few rows use each key and value, so reading
the cache takes the time. Caches in int8 and e4m3 (`kv_write.py`) and in int4 (`int4_cache.py`) have a float32 scale for
each token and KV head; int4 has its own Triton kernel for the parts (`attention_int4.py`).

Shapes as in `decode_attention` below. The keys of a sequence are divided among `splits` programs for each KV head, so
that one sequence fills the device. A program computes the softmax of its part, and the logarithm of its sum, for the
group * n rows that share the KV head, in one tensor-core tile; `merge_parts.py` weights the parts by those sums. The
length of a part follows from key_lengths on the device, and the number of parts from the width of the page table, so a
captured launch serves a growing sequence up to the capacity of its pages. Inside `row_invariant` the number of keys per
part does not depend on the batch; there, several new tokens must be passed as sequences of one token each, because a
program's rounding may depend on its number of rows.

Bytes, for each sequence of t cached tokens and each layer: 2 t kv_heads head_dim elements of the cache, once (2 KiB per
token in bf16 at full size, 92 MB at 45 000 tokens; in int8 and e4m3 1 KiB and 32 bytes of scales, in int4 half a KiB
and 32 bytes), and the page table. In addition the parts, 4 n heads (head_dim + 1) bytes each, written once and read
once (66 parts and 2 MB on 132 multiprocessors at one new token, in the L2 cache). FLOPs: 4 t n heads head_dim, 7 for
each byte of a bf16 cache at full size and one new token; padding the tile to 16 rows makes it 16.
Source: Dao et al. 2023 (Flash-Decoding); Kwon et al. 2023 (PagedAttention).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import native
from .attention import check_attention, gathered, visible_keys
from .attention import reference as attention_reference
from .attention_int4 import attend_int4, unsupported_heads
from .attention_libraries import DECODE_TIMING, flash_attention, flash_misfit
from .configs import Config, Configs, multiprocessors
from .dispatch import Operation
from .e4m3 import readable, widened
from .int4_cache import KeyBias, is_int4
from .merge_parts import Parts, merge_by_last
from .native.attention import attend_natively
from .online_softmax import weigh
from .pages import locate_tokens
from .row_groups import is_row_invariant
from .strides import with_unit_stride
from .triton_language import tl, triton

MAX_NEW_TOKENS = 8
MAX_ROWS = 64  # per tile: 8 new tokens of a group of 8 heads
# Keys per task of the native kernel: two tasks, one being prefetched and one being computed, fit into an L2 cache of 1
# MB, and every thread gets some.
PART_KEYS = 128
FIXED_SHARE = 512  # keys per program where their number must not depend on the other sequences
PROGRAMS = 2  # per multiprocessor at a time: enough loads in flight to hide the memory's latency


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_lengths: Tensor,
    page_table: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    key_bias: KeyBias | None = None,
) -> Tensor:
    """The specification: causal attention in float64."""
    return attention_reference(q, k, v, True, scale, key_lengths, page_table, k_scales, v_scales, None, key_bias)


_operation = Operation("decode_attention", reference)


@triton.jit(do_not_specialize=["splits", "batches", "new_tokens", "table_row"])
def _attend_part(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    parts,
    log_sums,
    out,
    counters,
    key_lengths,
    page_table,
    k_scales,
    v_scales,
    scale,
    splits,
    batches,
    new_tokens,
    table_row,
    k_page,
    k_slot,
    k_head,
    v_page,
    v_slot,
    v_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Attention over one part of the keys of a sequence, and the base-2 logarithm of the sum of its softmax. With
    counters, the parts are also merged into `out`."""
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += kv_head * k_head
    v += kv_head * v_head

    row = tl.program_id(0) // KV_HEADS * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    in_rows = token < new_tokens
    channels = tl.arange(0, BLOCK_D)[None, :]
    mask = in_rows[:, None] & (channels < HEAD_DIM)
    q_row = (batch * new_tokens + token) * (KV_HEADS * GROUP) + head
    part_row = q_row + split.to(tl.int64) * batches * new_tokens * (KV_HEADS * GROUP)

    length = tl.load(key_lengths + batch).to(tl.int32)
    share = SHARE if SHARE > 0 else tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    first = split * share

    rows = tl.load(q + q_row[:, None] * HEAD_DIM + channels, mask=mask, other=0.0)
    last = length - new_tokens + token
    # The lowest finite number rather than -inf, so that a row that sees none of these keys does not compute inf - inf.
    row_max = tl.full((ROWS,), -3.4028234663852886e38, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    scale *= 1.4426950408889634  # log2(e): exponentials are of base 2
    for start in tl.range(first, tl.minimum(first + share, length), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        exists = key < length
        loaded = exists[:, None] & (channels < HEAD_DIM)
        page, slot = locate_tokens(page_table + batch * table_row, start, length, PAGE_SIZE, BLOCK_N)
        slot = slot.to(tl.int64)
        keys = tl.load(k + (page * k_page + slot * k_slot)[:, None] + channels, mask=loaded, other=0.0)
        scores = tl.dot(rows, tl.trans(widened(keys, q)), input_precision="ieee") * scale
        scale_at = (page * PAGE_SIZE + slot) * KV_HEADS + kv_head
        if k_scales is not None:
            scores *= tl.load(k_scales + scale_at, mask=exists, other=0.0)[None, :]
        scores = tl.where(key[None, :] <= last[:, None], scores, -float("inf"))
        weights, decay, row_max, row_sum = weigh(scores, row_max, row_sum)
        if v_scales is not None:
            # Times 127, the largest code in int8: weights as small as a scale would underflow in float16.
            weights *= tl.load(v_scales + scale_at, mask=exists, other=0.0)[None, :] * 127
        values = tl.load(v + (page * v_page + slot * v_slot)[:, None] + channels, mask=loaded, other=0.0)
        weights = weights.to(rows.dtype)
        acc = tl.dot(weights, widened(values, q), acc * decay[:, None], input_precision="ieee")

    log_sum = tl.where(row_sum > 0, row_max + tl.log2(row_sum), -float("inf"))
    tl.store(log_sums + part_row, log_sum, mask=in_rows)
    if v_scales is not None:
        row_sum *= 127
    acc /= tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    tl.store(parts + part_row[:, None] * HEAD_DIM + channels, acc.to(parts.dtype.element_ty), mask=mask)
    if counters is not None:
        total = batches * new_tokens * (KV_HEADS * GROUP)
        merge_by_last(parts, log_sums, out, counters, q_row, in_rows, splits, total, HEAD_DIM, BLOCK_D)


# Stages include the load of a page's number before that of its keys: five keep two tiles of keys and values in flight.
_NARROW = Config({"BLOCK_N": 32}, num_warps=4, num_stages=5)
_CONFIGS = Configs(
    "decode_attention",
    Config({"BLOCK_N": 64}, num_warps=4, num_stages=5),
    {"sm86": _NARROW, "sm89": _NARROW, "sm120": _NARROW, "gfx942": Config({"BLOCK_N": 32}, num_warps=4, num_stages=2)},
)
_CONFIGS_OF_MANY_ROWS = Configs("decode_attention of many rows", _NARROW, {"gfx942": _CONFIGS.by_family["gfx942"]})


@_operation.implementation("triton", lambda q, k, *_: unsupported_heads(k) if is_int4(k) else None)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_lengths: Tensor,
    page_table: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    key_bias: KeyBias | None = None,
) -> Tensor:
    q, page_table, key_lengths = (x.contiguous() for x in (q, page_table, key_lengths))
    k, v = map(with_unit_stride, (k, v))
    batch, new_tokens, heads, head_dim = q.shape
    page_size, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    most_rows = MAX_ROWS if q.element_size() == 2 else 16  # float32, without tensor cores, would fill the registers
    rows = min(most_rows, max(16, triton.next_power_of_2(group * new_tokens)))
    block_d = max(16, triton.next_power_of_2(head_dim))
    config = (_CONFIGS if rows < MAX_ROWS else _CONFIGS_OF_MANY_ROWS).on(q.device)
    programs = kv_heads * triton.cdiv(group * new_tokens, rows)
    most_keys = page_table.shape[1] * page_size
    if is_row_invariant():
        share, splits = FIXED_SHARE, triton.cdiv(most_keys, FIXED_SHARE)
    else:
        share, splits = 0, split_count(q.device, programs * batch, triton.cdiv(most_keys, config.blocks["BLOCK_N"]))
    made = Parts(q, k, splits, programs * batch, rows)
    if is_int4(k):
        attend_int4(
            q,
            k,
            v,
            made.parts,
            made.log_sums,
            key_lengths,
            page_table,
            k_scales,
            v_scales,
            key_bias,
            scale=scale,
            rows=rows,
            splits=splits,
            share=share,
            out=made.out,
            counters=made.counters,
        )
        return made.merged()
    _attend_part[(programs, splits, batch)](
        q,
        readable(k),
        readable(v),
        made.parts,
        made.log_sums,
        made.out,
        made.counters,
        key_lengths,
        page_table,
        k_scales,
        v_scales,
        scale,
        splits,
        batch,
        new_tokens,
        page_table.stride(0),
        *k.stride()[:3],
        *v.stride()[:3],
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        ROWS=rows,
        BLOCK_D=block_d,
        SHARE=share,
        **config.options(),
    )
    return made.merged()


def split_count(device: torch.device, programs: int, blocks: int) -> int:
    """Parts into which to divide the keys, of at most `blocks` blocks, where each part takes `programs` programs.

    As many as run at the same time: with more, some would wait; with fewer, multiprocessors would be idle.
    """
    return max(1, min(PROGRAMS * multiprocessors(device) // programs, blocks))


@_operation.implementation("native", lambda q, *_: native.misfit(q))
def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_lengths: Tensor,
    page_table: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    key_bias: KeyBias | None = None,
) -> Tensor:
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    return attend_natively(
        q,
        k,
        v,
        True,
        scale,
        key_lengths,
        page_table,
        k_scales,
        v_scales,
        None,
        key_bias,
        row_block=rows,
        part_keys=PART_KEYS,
    )


@_operation.implementation("torch")
def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_lengths: Tensor,
    page_table: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    key_bias: KeyBias | None = None,
) -> Tensor:
    batch, new_tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # The rows of a group and its new tokens share each KV head, so they form one small matrix against it.
    rows = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    outputs = []
    for b, length in enumerate(key_lengths.tolist()):
        keys, values = (
            gathered(cache, scales, page_table[b], length, q.dtype, bias).transpose(0, 1)
            for cache, scales, bias in ((k, k_scales, key_bias), (v, v_scales, None))
        )
        mask = None
        if new_tokens > 1:
            mask = visible_keys(new_tokens, length, True, q.device).repeat(heads // kv_heads, 1)
        # With a batch dimension, which its fused kernel asks for.
        out = F.scaled_dot_product_attention(rows[b : b + 1], keys[None], values[None], attn_mask=mask, scale=scale)
        outputs.append(out)
    out = torch.cat(outputs).unflatten(2, (-1, new_tokens)).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, new_tokens, heads, head_dim)


@_operation.implementation("flash_attn", lambda q, k, v, *rest: flash_misfit(q, k, v, True, *rest))
def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_lengths: Tensor,
    page_table: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    key_bias: KeyBias | None = None,
) -> Tensor:
    return flash_attention(q, k, v, True, scale, key_lengths, page_table)


_operation.timed(DECODE_TIMING)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor,
    page_table: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    key_bias: KeyBias | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the last n tokens of each sequence over its cache, which already holds them.

    q: [batch, n, heads, head_dim] with n <= MAX_NEW_TOKENS, rotated; k, v: pools [pages, page_size, kv_heads,
    head_dim] of q's dtype, or int8, float8_e4m3fn, or int4 [..., head_dim / 2] uint8, with the float32 scales k_scales,
    v_scales: [pages, page_size, kv_heads]; key_bias: the bias that was subtracted from the keys of an int4 cache;
    key_lengths: [batch] int, tokens in the cache, at least the n new ones; page_table: [batch, max_pages] int. Returns
    a tensor like q; softmax in float32. Raises ValueError when shapes or dtypes do not fit.
    """
    check_attention(q, k, v, key_lengths, page_table, k_scales, v_scales, key_bias)
    if not 1 <= q.shape[1] <= MAX_NEW_TOKENS:
        raise ValueError(f"decode_attention takes 1 to {MAX_NEW_TOKENS} new tokens, got {q.shape[1]}; use attention")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _operation.on(q.device)(q, k, v, scale, key_lengths, page_table, k_scales, v_scales, key_bias)
