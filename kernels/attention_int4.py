"""The Triton kernel of attention over an int4 cache, for many queries, and for few with the keys split into parts.

The kernel loads keys and values in four bits. With H of `int4_cache.py`,

    q . k[j] = scale[j] * (H q) . codes[j] + q . R_j b          sum_j w[j] v[j] = H (sum_j w[j] scale[j] codes[j])

so a program transforms its queries once before the loop over the keys, and its sums once after it. R_j b is the bias b
of the keys, rotated by the angles of token j. Its term of the score is a separate product, with the table of cosines
and sines that all layers and heads share (512 bytes per token, from the L2 cache):

    q . R_j b = (q1 b1 + q2 b2) . cos[j] + (q2 b1 - q1 b2) . sin[j]          for the halves 1 and 2 of the channels

The two codes of a byte belong to the two halves, so each product is two products of half the width, and nothing is
interleaved. Parts are merged as in `merge_parts.py`.
"""

from torch import Tensor

from .configs import Config, Configs
from .int4_cache import KeyBias, walsh_hadamard_rows
from .merge_parts import merge_by_last
from .online_softmax import weigh
from .pages import locate_tokens
from .triton_language import tl, triton


@triton.jit(do_not_specialize=["splits", "batches", "queries", "table_row"])
def _attend_int4(  # type: ignore[no-untyped-def]
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
    k_bias,
    key_cos,
    key_sin,
    scale,
    splits,
    batches,
    queries,
    table_row,
    k_page,
    k_slot,
    k_head,
    v_page,
    v_slot,
    v_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SHARE: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention over one part of the keys of a sequence, and the base-2 logarithm of the sum of its softmax. With
    counters, the parts are also merged into `out`.

    HALF = 2^STAGES: half the channels of a head. SHARE: keys per part, 0 to divide them evenly.
    """
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += kv_head * k_head
    v += kv_head * v_head

    first_row = tl.program_id(0) // KV_HEADS * ROWS
    row = first_row + tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    in_rows = token < queries
    channels = tl.arange(0, HALF)[None, :]
    q_row = (batch * queries + token) * (KV_HEADS * GROUP) + head
    part_row = q_row + split.to(tl.int64) * batches * queries * (KV_HEADS * GROUP)

    length = tl.load(key_lengths + batch).to(tl.int32)
    share = SHARE if SHARE > 0 else tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    first = split * share
    # No row of the tile sees a key from `end` on.
    end = tl.minimum(length - queries + (first_row + ROWS - 1) // GROUP + 1, length)

    # H of all channels is H of each half, then their sum and difference. DOWN, a power of two, keeps the transformed
    # queries as large as the given ones, within the range of float16.
    DOWN: tl.constexpr = 1.0 / (1 << ((STAGES + 1) // 2))
    q_at = q + q_row[:, None] * (2 * HALF) + channels
    one = tl.load(q_at, mask=in_rows[:, None], other=0.0).to(tl.float32)
    two = tl.load(q_at + HALF, mask=in_rows[:, None], other=0.0).to(tl.float32)
    dtype = q.dtype.element_ty
    along, across = one, two
    if k_bias is not None:
        bias_at = k_bias + kv_head * (2 * HALF) + channels
        bias_one, bias_two = tl.load(bias_at).to(tl.float32) * DOWN, tl.load(bias_at + HALF).to(tl.float32) * DOWN
        along = one * bias_one + two * bias_two
        across = two * bias_one - one * bias_two
    along, across = along.to(dtype), across.to(dtype)
    one, two = walsh_hadamard_rows(one, ROWS, HALF, STAGES), walsh_hadamard_rows(two, ROWS, HALF, STAGES)
    low_rows, high_rows = ((one + two) * DOWN).to(dtype), ((one - two) * DOWN).to(dtype)

    last = length - queries + token
    # The lowest finite number rather than -inf, so that a row that sees none of these keys does not compute inf - inf.
    row_max = tl.full((ROWS,), -3.4028234663852886e38, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    low_sum, high_sum = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    scale *= 1.4426950408889634 / DOWN  # log2(e): exponentials are of base 2
    for start in tl.range(first, tl.minimum(first + share, end), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        exists = key < length
        loaded = exists[:, None]
        page, slot = locate_tokens(page_table + batch * table_row, start, length, PAGE_SIZE, BLOCK_N)
        slot = slot.to(tl.int64)
        scale_at = (page * PAGE_SIZE + slot) * KV_HEADS + kv_head
        codes = tl.load(k + (page * k_page + slot * k_slot)[:, None] + channels, mask=loaded, other=0)
        low = ((codes & 15).to(tl.int8) * 2 - 15).to(dtype)
        high = ((codes >> 4).to(tl.int8) * 2 - 15).to(dtype)
        scores = tl.dot(low_rows, tl.trans(low), input_precision="ieee")
        scores = tl.dot(high_rows, tl.trans(high), scores, input_precision="ieee")
        scores *= tl.load(k_scales + scale_at, mask=exists, other=0.0)[None, :]
        if k_bias is not None:
            turn_at = key.to(tl.int64)[:, None] * HALF + channels
            cosines = tl.load(key_cos + turn_at, mask=loaded, other=0.0).to(dtype)
            sines = tl.load(key_sin + turn_at, mask=loaded, other=0.0).to(dtype)
            scores = tl.dot(along, tl.trans(cosines), scores, input_precision="ieee")
            scores = tl.dot(across, tl.trans(sines), scores, input_precision="ieee")
        scores = tl.where((key[None, :] <= last[:, None]) & exists[None, :], scores * scale, -float("inf"))
        weights, decay, row_max, row_sum = weigh(scores, row_max, row_sum)
        # Times 32 HALF, which turns a scale into the largest transformed magnitude: weights as small as a scale would
        # underflow in float16.
        weights *= tl.load(v_scales + scale_at, mask=exists, other=0.0)[None, :] * (32 * HALF)
        weights = weights.to(dtype)
        codes = tl.load(v + (page * v_page + slot * v_slot)[:, None] + channels, mask=loaded, other=0)
        low = ((codes & 15).to(tl.int8) * 2 - 15).to(dtype)
        high = ((codes >> 4).to(tl.int8) * 2 - 15).to(dtype)
        low_sum = tl.dot(weights, low, low_sum * decay[:, None], input_precision="ieee")
        high_sum = tl.dot(weights, high, high_sum * decay[:, None], input_precision="ieee")

    log_sum = tl.where(row_sum > 0, row_max + tl.log2(row_sum), -float("inf"))
    tl.store(log_sums + part_row, log_sum, mask=in_rows)
    row_sum *= 32 * HALF
    row_sum = tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    one = walsh_hadamard_rows(low_sum / row_sum, ROWS, HALF, STAGES)
    two = walsh_hadamard_rows(high_sum / row_sum, ROWS, HALF, STAGES)
    part_at = parts + part_row[:, None] * (2 * HALF) + channels
    tl.store(part_at, (one + two).to(parts.dtype.element_ty), mask=in_rows[:, None])
    tl.store(part_at + HALF, (one - two).to(parts.dtype.element_ty), mask=in_rows[:, None])
    if counters is not None:
        rows = batches * queries * (KV_HEADS * GROUP)
        merge_by_last(parts, log_sums, out, counters, q_row, in_rows, splits, rows, 2 * HALF, 2 * HALF, AT_ONCE=4)


CONFIGS = Configs("attention_int4", Config({"BLOCK_N": 32}, num_warps=4, num_stages=2))
# For many rows: on chips with operands in registers, their sums take more registers than four warps have.
_OF_MANY_ROWS = Configs(
    "attention_int4 of many rows",
    CONFIGS.default,
    dict.fromkeys(("sm86", "sm89", "sm120"), Config({"BLOCK_N": 32}, num_warps=8, num_stages=2)),
)


def unsupported_heads(k: Tensor) -> str | None:
    """What this kernel does not cover of an int4 cache, as `Operation.implementation` takes it, or None."""
    head_dim = 2 * k.shape[-1]
    return None if 32 <= head_dim <= 256 else f"int4 keys of {head_dim} channels"


def attend_int4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Tensor,
    log_sums: Tensor,
    key_lengths: Tensor,
    page_table: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    key_bias: KeyBias | None,
    *,
    scale: float,
    rows: int,
    splits: int = 1,
    share: int = 0,
    out: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """Causal attention over the pages of an int4 cache INTO `parts`, [splits, *q.shape], or like q for one part.

    parts: float32 if there are several; log_sums: their logarithms, [splits, batch, queries, heads] float32, written.
    rows: queries times heads of a program; share: keys per part, 0 to divide them evenly. counters: with which the
    programs merge the parts INTO `out`, see `merge_parts.py`. q, key_lengths and page_table are contiguous.
    """
    batch, queries, heads, head_dim = q.shape
    page_size, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    bias, cos, sin = (None, None, None) if key_bias is None else (key_bias.bias, key_bias.cos, key_bias.sin)
    _attend_int4[(kv_heads * triton.cdiv(group * queries, rows), splits, batch)](
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
        bias,
        cos,
        sin,
        scale,
        splits,
        batch,
        queries,
        page_table.stride(0),
        *k.stride()[:3],
        *v.stride()[:3],
        KV_HEADS=kv_heads,
        GROUP=group,
        PAGE_SIZE=page_size,
        SHARE=share,
        HALF=head_dim // 2,
        STAGES=(head_dim // 2).bit_length() - 1,
        ROWS=rows,
        **(_OF_MANY_ROWS if rows >= 64 else CONFIGS).on(q.device).options(),
    )
