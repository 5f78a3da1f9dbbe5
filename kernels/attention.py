"""Attention over many queries: bidirectional with key lengths (encoder), or causal behind a prefix (prefill).

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]          over the keys j that query i may see

Without `causal` a query sees the first key_lengths[b] keys of its sequence. With `causal` the queries are the LAST
tokens of their sequence: query i of n sees the keys up to index key_lengths[b] - n + i. Query head h reads KV head h //
(heads / kv_heads) (GQA). Keys and values are dense, [batch, keys, kv_heads, head_dim], or paged (`page_table` given,
see `pages.py`). Paged ones may be int8 or e4m3 with a scale for each token and head (`kv_write.py`), or int4
(`int4_cache.py`), which has its own Triton kernel (`attention_int4.py`).
`rotation` rotates the queries as they are loaded. Keys in a cache are already rotated; `key_rotation` rotates dense
keys. So this operation serves RoPE, the report's RoTE (positions -2 pi * seconds, interleaved pairs) and no rotation.

FLOPs: 4 * head_dim per head and visible pair of query and key, half of them in each product; they limit both uses on a
GPU. Bytes: q and out once, k and v at least once.

The Triton kernel makes one pass (flash attention). A program has a tile of rows, each one query of one head; the query
heads of a KV head are neighbouring rows, so they share its keys and values. The program iterates over the visible keys
a tile at a time with a running maximum and sum, in float32 and in base 2. It skips tiles that no row sees, and masks
only tiles that some rows see and others do not. sm_90 and sm_100 load the tiles by TMA (tensor descriptors), other
chips through pointers. So the kernel loads k and v once for each 128 rows (18 queries of a group of 7), mostly from the
L2 cache: 128 FLOPs for each byte. At full size one head of a window is 12 tiles in the encoder, and 1024 tokens of
prefill are 56 tiles for each KV head. The native kernel (`native/attention.py`) works alike, with up to 1024 rows that
share keys and values.
Source: Vaswani et al. 2017; Milakov and Gimelshein 2018 (online softmax); Dao 2023 (FlashAttention-2); Ainslie et al.
2023 (GQA); Goel et al. 2024, arXiv:2410.12109 (RoTE in attention).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import native
from .arguments import FLOAT32, FLOATING, INTEGERS, check_tensors
from .attention_int4 import attend_int4, unsupported_heads
from .attention_libraries import TIMING, cudnn_attention, cudnn_misfit, flash_attention, flash_misfit
from .configs import Config, Configs, family
from .dispatch import Operation
from .e4m3 import readable, widen, widened
from .int4_cache import HEAD_DIMS, KeyBias, dequantize_int4, is_int4
from .native.attention import BLOCK_VALUES, attend_natively
from .online_softmax import weigh
from .pages import QUANTIZED, gather_pages, locate_tokens, page_of
from .quantize_rows import E4M3
from .rotary import Rotation, check_rotation, load_turned, load_turns, rotary
from .rotary import reference as rotary_reference
from .strides import with_unit_stride
from .triton_language import TensorDescriptor, tl, triton


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rotation: Rotation | None = None,
    key_bias: KeyBias | None = None,
    rounds: bool = False,
) -> Tensor:
    """The specification: float64, one sequence and one query head at a time. rounds: changes nothing."""
    if rotation is not None:
        q = rotary_reference(q, rotation)
    out = torch.empty_like(q)
    sequences = _sequences(q, k, v, key_lengths, page_table, k_scales, v_scales, key_bias, torch.float64)
    for b, (keys, values) in enumerate(sequences):
        visible = visible_keys(q.shape[1], keys.shape[0], causal, q.device)
        for h in range(q.shape[2]):
            kv_head = h // (q.shape[2] // keys.shape[1])
            scores = q[b, :, h].double() @ keys[:, kv_head].T * scale
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            out[b, :, h] = (weights @ values[:, kv_head]).to(q.dtype)
    return out


_operation = Operation("attention", reference)


@triton.jit
def _load_queries(  # type: ignore[no-untyped-def]
    q, cos, sin, q_rows, tokens, mask, PAIRS: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A tile of queries, rotated when there is a table of cosines: [BLOCK_M, BLOCK_D] of the dtype of q."""
    channels = tl.arange(0, BLOCK_D)[None, :]
    if cos is None:
        rows = tl.load(q + q_rows + channels, mask=mask, other=0.0)
    else:
        turn_cos, turn_sin = load_turns(cos, sin, tokens, channels, mask, PAIRS, HALF)
        rows = load_turned(q, q_rows, channels, mask, turn_cos, turn_sin, PAIRS, HALF).to(q.dtype.element_ty)
    return rows


@triton.jit(do_not_specialize=["queries", "keys", "table_row"])
def _kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    out,
    cos,
    sin,
    key_lengths,
    page_table,
    k_scales,
    v_scales,
    k_tiles,
    v_tiles,
    scale,
    queries,
    keys,
    table_row,
    q_batch,
    q_token,
    q_head,
    k_page,
    k_slot,
    k_head,
    v_page,
    v_slot,
    v_head,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    ROUNDS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The later a causal tile's queries, the more keys it has. The longest tiles start first, so that short ones finish
    # last.
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    kv_head, kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    length = keys if key_lengths is None else tl.load(key_lengths + batch).to(tl.int32)
    k += kv_head * k_head
    v += kv_head * v_head

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // GROUP, kv_head * GROUP + row % GROUP
    channels = tl.arange(0, BLOCK_D)[None, :]
    mask = (query < queries)[:, None] & (channels < HEAD_DIM)
    q_rows = (batch * q_batch + query.to(tl.int64) * q_token + head * q_head)[:, None]
    tokens = (batch * queries + query)[:, None]
    rows = _load_queries(q, cos, sin, q_rows, tokens, mask, PAIRS, HALF, BLOCK_D)
    codes, row_scales = rows, scale
    if ROUNDS:
        wide = rows.to(tl.float32)
        row_scales = tl.max(tl.abs(wide), 1)[:, None] / 127
        wide = wide / tl.where(row_scales > 0, row_scales, 1.0)
        codes = (wide + tl.where(wide < 0, -0.5, 0.5)).to(tl.int8)

    # Every row of the tile sees the keys before `whole`; no row sees keys from `end` on.
    last = tl.full((BLOCK_M,), length - 1, tl.int32)
    whole, end = length, length
    if CAUSAL:
        last = length - queries + query
        whole = length - queries + tile * BLOCK_M // GROUP + 1
        end = tl.minimum(length - queries + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, length)
    whole = tl.maximum(whole, 0) // BLOCK_N * BLOCK_N

    # The lowest finite number rather than -inf, so that a row that has seen no key yet does not compute inf - inf.
    row_max = tl.full((BLOCK_M,), -3.4028234663852886e38, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    scale *= 1.4426950408889634  # log2(e): exponentials are of base 2
    if page_table is not None:
        page_table += batch * table_row
    AHEAD: tl.constexpr = PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N == 0  # a tile lies in one page, looked up a tile before
    for masked in tl.static_range(2):
        first_token = whole if masked else 0
        next_page = page_of(page_table, first_token, length, PAGE_SIZE) if AHEAD else batch
        for start in tl.range(first_token, end if masked else whole, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            exists = token < length
            if page_table is None:
                page, slot = batch, token
            elif AHEAD:
                page, slot = next_page.to(tl.int64), start % PAGE_SIZE + tl.arange(0, BLOCK_N)
                next_page = page_of(page_table, start + BLOCK_N, length, PAGE_SIZE)
            else:
                page, slot = locate_tokens(page_table, start, length, PAGE_SIZE, BLOCK_N)
            if k_tiles is not None:
                first = start if page_table is None else start % PAGE_SIZE
                corner = [page.to(tl.int32), first, (kv_head * HEAD_DIM).to(tl.int32)]
                k_tile = k_tiles.load(corner).reshape(BLOCK_N, BLOCK_D)
                v_tile = v_tiles.load(corner).reshape(BLOCK_N, BLOCK_D)
                if masked and v_tile.dtype != tl.int8:
                    # Memory past the last token may hold NaN, and 0 * NaN is NaN.
                    v_tile = tl.where(exists[:, None], v_tile, 0.0)
            else:
                k_at = k + (page * k_page + slot.to(tl.int64) * k_slot)[:, None] + channels
                v_at = v + (page * v_page + slot.to(tl.int64) * v_slot)[:, None] + channels
                if masked or BLOCK_D != HEAD_DIM:
                    loaded = exists[:, None] & (channels < HEAD_DIM)
                    k_tile, v_tile = tl.load(k_at, mask=loaded, other=0.0), tl.load(v_at, mask=loaded, other=0.0)
                else:
                    k_tile, v_tile = tl.load(k_at), tl.load(v_at)
            if ROUNDS:
                scores = tl.dot(codes, tl.trans(k_tile)).to(tl.float32) * (row_scales * scale)
            else:
                scores = tl.dot(rows, tl.trans(widened(k_tile, q)), input_precision="ieee") * scale
            scale_at = (page * PAGE_SIZE + slot.to(tl.int64)) * kv_heads + kv_head
            if k_scales is not None:
                scores *= tl.load(k_scales + scale_at, mask=exists, other=0.0)[None, :]
            if masked:
                scores = tl.where((token[None, :] <= last[:, None]) & exists[None, :], scores, -float("inf"))
            weights, decay, row_max, row_sum = weigh(scores, row_max, row_sum)
            if v_scales is not None:
                # Times 127, the largest code in int8: weights as small as a scale would underflow in float16.
                weights *= tl.load(v_scales + scale_at, mask=exists, other=0.0)[None, :] * 127
            weights = weights.to(rows.dtype)
            acc = tl.dot(weights, widened(v_tile, q), acc * decay[:, None], input_precision="ieee")
    if v_scales is not None:
        row_sum *= 127
    acc /= tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    out_rows = ((tokens * kv_heads + kv_head) * GROUP + (row % GROUP)[:, None]) * HEAD_DIM
    tl.store(out + out_rows + channels, acc.to(out.dtype.element_ty), mask=mask)


# By head_dim. Up to sm_89 and on sm_120 the operands of a product are in registers, which for wide heads leaves room
# for 32 keys; sm_90 and sm_100 have them in shared memory. With pages, the first of the three stages looks up the page.
_CANDIDATES = [
    Config({"BLOCK_M": rows, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)
    for rows, keys, warps, stages in (
        (64, 32, 4, 3),
        (64, 64, 4, 3),
        (128, 32, 4, 3),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
    )
]
_CONFIGS = {
    64: Configs(
        "attention_64", Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3), candidates=_CANDIDATES
    ),
    128: Configs(
        "attention_128",
        Config({"BLOCK_M": 128, "BLOCK_N": 32}, num_warps=8, num_stages=3),
        dict.fromkeys(("sm90", "sm100"), Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3)),
        candidates=_CANDIDATES,
    ),
}
# Where operands are in registers, a wide tile of 128 rows leaves none for its cosines and sines, or the scales of int8.
_CROWDED = Configs(
    "attention_128_crowded",
    Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=3),
    {**_CONFIGS[128].by_family, "gfx942": Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2)},
    candidates=_CANDIDATES,
)
# The chips that load tiles by TMA, without registers, which makes room for 128 keys of a wide head. sm_120 has TMA,
# too, but its operands are in registers, which the tiles would spill.
_FETCHING = ("sm90", "sm100")
_FETCHED = Configs(
    "attention_128_fetched",
    Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3),
    candidates=_CANDIDATES,
)
# Float32 is for comparisons: exact products without tensor cores. No supported model has heads wider than 128.
_SMALL = Configs("attention_small", Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=2))


def _fetchable(x: Tensor) -> bool:
    """Whether TMA can load tiles of these keys or values: heads side by side, strides in multiples of 16 bytes."""
    *outer, head_step, _ = x.stride()
    steps = (*outer, x.storage_offset())
    aligned = all(step * x.element_size() % 16 == 0 for step in steps) and x.data_ptr() % 16 == 0
    return family(x.device) in _FETCHING and aligned and head_step == x.shape[3] and x.shape[3] in (64, 128)


def _tiles(x: Tensor, block: int) -> TensorDescriptor:
    """Keys or values as tiles of one page or sequence, `block` tokens and one head."""
    pages, tokens, kv_heads, head_dim = x.shape
    rows = x.as_strided((pages, tokens, kv_heads * head_dim), (x.stride(0), x.stride(1), 1))
    return TensorDescriptor.from_tensor(rows, [1, block, head_dim])


def _triton_misfit(q: Tensor, k: Tensor, v: Tensor, causal: bool, *_: object, **__: object) -> str | None:
    if not is_int4(k):
        return None
    return unsupported_heads(k) if causal else "int4 keys without a causal mask"


@_operation.implementation("triton", _triton_misfit)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rotation: Rotation | None = None,
    key_bias: KeyBias | None = None,
    rounds: bool = False,
) -> Tensor:
    q, k, v = map(with_unit_stride, (q, k, v))
    if page_table is not None and page_table.stride(-1) != 1:
        page_table = page_table.contiguous()
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    out = q.new_empty(q.shape)
    if q.numel() == 0:
        return out
    if is_int4(k):
        assert key_lengths is not None
        assert page_table is not None
        q = (q if rotation is None else rotary(q, rotation)).contiguous()
        sums = q.new_empty((1, batch, queries, heads), dtype=torch.float32)
        rows = 64 if q.element_size() == 2 else 16  # float32, without tensor cores, would fill the registers
        lengths, table = key_lengths.contiguous(), page_table.contiguous()
        attend_int4(q, k, v, out, sums, lengths, table, k_scales, v_scales, key_bias, scale=scale, rows=rows)
        return out
    cos, sin = (None, None) if rotation is None else rotation.cos_sin
    block_d = max(32 if rounds else 16, triton.next_power_of_2(head_dim))
    page_size = 0 if page_table is None else k.shape[1]

    fetched = q.element_size() == 2 and _fetchable(k) and _fetchable(v)

    def launch(config: Config) -> None:
        block_n = config.blocks["BLOCK_N"]
        tiled = fetched and page_size % block_n == 0
        _kernel[(triton.cdiv(queries * group, config.blocks["BLOCK_M"]), kv_heads, batch)](
            q,
            readable(k),
            readable(v),
            out,
            cos,
            sin,
            None if key_lengths is None else key_lengths.contiguous(),
            page_table,
            k_scales,
            v_scales,
            _tiles(k, block_n) if tiled else None,
            _tiles(v, block_n) if tiled else None,
            scale,
            queries,
            k.shape[1],
            0 if page_table is None else page_table.stride(0),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            CAUSAL=causal,
            GROUP=group,
            HEAD_DIM=head_dim,
            PAIRS=0 if cos is None else cos.shape[-1],
            HALF=rotation is not None and rotation.pairing == "half",
            ROUNDS=rounds,
            PAGE_SIZE=page_size,
            BLOCK_D=block_d,
            **config.options(),
        )

    configs = _CONFIGS.get(max(64, block_d), _SMALL)
    if q.element_size() > 2:
        configs = _SMALL
    elif block_d == 128 and (rotation is not None or k_scales is not None):
        configs = _CROWDED
    elif block_d == 128 and fetched and page_size % 128 == 0:
        configs = _FETCHED
    key = (str(q.dtype), str(k.dtype), head_dim, group, causal, page_size, rotation is not None, fetched, rounds)
    launch(configs.on(q.device, key, launch))
    return out


@_operation.implementation("native", lambda q, *_, **__: native.misfit(q))
def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rotation: Rotation | None = None,
    key_bias: KeyBias | None = None,
    rounds: bool = False,
) -> Tensor:
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    threads, heads = torch.get_num_threads(), q.shape[0] * k.shape[2]
    # Enough tasks to keep all threads busy until the end, each with enough rows to make laying out its keys cheap, and
    # no more than the L2 cache holds.
    blocks = max(-(-rows * q.shape[3] // BLOCK_VALUES), min(-(-4 * threads // heads), rows // 256))
    return attend_natively(
        q,
        k,
        v,
        causal,
        scale,
        key_lengths,
        page_table,
        k_scales,
        v_scales,
        rotation,
        key_bias,
        row_block=-(-rows // blocks),
        rounds=rounds,
    )


@_operation.implementation("torch")
def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rotation: Rotation | None = None,
    key_bias: KeyBias | None = None,
    rounds: bool = False,
) -> Tensor:
    if rotation is not None:
        q = rotary(q, rotation)
    if page_table is None and not causal:
        mask = None
        if key_lengths is not None and int(key_lengths.min()) < k.shape[1]:
            mask = (torch.arange(k.shape[1], device=q.device) < key_lengths[:, None])[:, None, None, :]
        return _grouped_attention(q, k, v, mask, scale)
    outputs = []
    sequences = _sequences(q, k, v, key_lengths, page_table, k_scales, v_scales, key_bias, q.dtype)
    for b, (keys, values) in enumerate(sequences):
        # Without a prefix the fused kernel skips masked keys, which halves its work; but it masks with -inf before it
        # scales, which is right for a positive scale only.
        whole = causal and q.shape[1] == keys.shape[0] and scale > 0
        visible = None if whole else visible_keys(q.shape[1], keys.shape[0], causal, q.device)
        outputs.append(_grouped_attention(q[b : b + 1], keys[None], values[None], visible, scale, whole))
    return torch.cat(outputs)


_operation.implementation("flash_attn", flash_misfit)(flash_attention)
_operation.implementation("cudnn", cudnn_misfit)(cudnn_attention)
_operation.timed(TIMING)


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    key_bias: KeyBias | None,
    dtype: torch.dtype,
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each sequence as `dtype`, [length, kv_heads, head_dim], cut to its length."""
    lengths = [k.shape[1]] * q.shape[0] if key_lengths is None else key_lengths.tolist()
    if page_table is None:
        return [(k[b, :length].to(dtype), v[b, :length].to(dtype)) for b, length in enumerate(lengths)]
    return [
        (gathered(k, k_scales, pages, length, dtype, key_bias), gathered(v, v_scales, pages, length, dtype))
        for pages, length in zip(page_table, lengths, strict=True)
    ]


def gathered(
    cache: Tensor,
    scales: Tensor | None,
    pages: Tensor,
    length: int,
    dtype: torch.dtype,
    key_bias: KeyBias | None = None,
) -> Tensor:
    """The first `length` tokens in `pages`, in `dtype`; a quantized cache is dequantized."""
    x = gather_pages(cache, pages, length)
    if scales is None:
        return x.to(dtype)
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    scales = gather_pages(scales, pages, length)
    if not is_int4(cache):
        x = widen(x, at_least_float32) if x.dtype == E4M3 else x.to(at_least_float32)
        return (x * scales[..., None]).to(dtype)
    x = dequantize_int4(x, scales, at_least_float32)
    return (x if key_bias is None else x + key_bias.rotated(length, at_least_float32)).to(dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rotation: Rotation | None = None,
    key_rotation: Rotation | None = None,
    key_bias: KeyBias | None = None,
) -> Tensor:
    """Attention of q over dense or paged keys and values.

    q: [batch, queries, heads, head_dim], float32, bfloat16 or float16; k, v: [batch, keys, kv_heads, head_dim], or with
    `page_table` ([batch, max_pages] int) pools [pages, page_size, kv_heads, head_dim], of the dtype of q or, with
    k_scales and v_scales ([pages, page_size, kv_heads] float32), int8, float8_e4m3fn, or int4 [..., head_dim / 2]
    uint8. key_lengths: [batch] int, required with pages, at least 1, and at least the number of queries when causal.
    rotation rotates q, key_rotation dense k. key_bias: the bias that was subtracted from the keys of an int4 cache.
    scale defaults to head_dim ** -0.5.
    Returns a tensor like q; softmax in float32. Raises ValueError when shapes or dtypes do not fit.
    """
    check_attention(q, k, v, key_lengths, page_table, k_scales, v_scales, key_bias)
    if causal and page_table is None and k.shape[1] < q.shape[1]:
        raise ValueError(f"causal queries are the last of their sequence, got {q.shape[1]} queries, {k.shape[1]} keys")
    if rotation is not None:
        check_rotation(q, rotation)
    if key_rotation is not None:
        if page_table is not None:
            raise ValueError("keys in a paged cache are rotated when they are written, not by attention")
        k = rotary(k, key_rotation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _operation.on(q.device)(
        q, k, v, causal, scale, key_lengths, page_table, k_scales, v_scales, rotation, key_bias
    )


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    key_bias: KeyBias | None = None,
) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit together."""
    alike = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[-1] == k.shape[-1] * (2 if is_int4(k) else 1)
    if not alike or q.shape[2] % k.shape[2] or (page_table is None and k.shape[0] != q.shape[0]):
        raise ValueError(
            "attention takes q [batch, queries, heads, head_dim] and k, v alike with kv_heads dividing heads, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} of {k.dtype}"
        )
    if page_table is not None and (key_lengths is None or page_table.shape[:1] != q.shape[:1]):
        raise ValueError(
            "paged keys need key_lengths, and one row of the page table for each of the "
            f"{q.shape[0]} sequences, got a table of shape {tuple(page_table.shape)}"
        )
    if key_lengths is not None and key_lengths.shape != q.shape[:1]:
        raise ValueError(f"key_lengths must have the shape {tuple(q.shape[:1])}, got {tuple(key_lengths.shape)}")
    for x, scales in ((k, k_scales), (v, v_scales)):
        _check_scales(q, x, scales, page_table)
    check_tensors(q, FLOATING, q=q)
    check_tensors(q, FLOATING | QUANTIZED, k=k, v=v)
    check_tensors(q, INTEGERS, key_lengths=key_lengths, page_table=page_table)
    check_tensors(q, FLOAT32, k_scales=k_scales, v_scales=v_scales)
    if k.dtype != v.dtype:
        raise ValueError(f"keys and values must have one dtype, got {k.dtype} and {v.dtype}")
    if is_int4(k) and q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"an int4 cache takes heads of {', '.join(map(str, HEAD_DIMS))} channels, got {q.shape[-1]}")
    if key_bias is not None:
        _check_key_bias(q, k, key_bias)


def _check_key_bias(q: Tensor, k: Tensor, key_bias: KeyBias) -> None:
    bias, cos, sin = key_bias.bias, key_bias.cos, key_bias.sin
    shape, half = (k.shape[2], q.shape[-1]), q.shape[-1] // 2
    fits = bias.shape == shape and cos.shape == sin.shape and cos.shape[1:] == (half,)
    if not is_int4(k) or not fits or not all(x.is_contiguous() for x in (bias, cos, sin)):
        raise ValueError(
            f"key_bias is of int4 keys, contiguous, a bias of {shape} and tables [tokens, {half}], got keys of "
            f"{k.dtype}, {tuple(bias.shape)}, {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    check_tensors(q, {q.dtype}, bias=bias)
    check_tensors(q, FLOAT32, cos=cos, sin=sin)


def _check_scales(q: Tensor, x: Tensor, scales: Tensor | None, page_table: Tensor | None) -> None:
    if x.dtype not in ((q.dtype,) if scales is None else QUANTIZED):
        raise ValueError(f"keys and values are {q.dtype} like q, or int4, int8 or fp8 with scales; got {x.dtype}")
    if scales is None:
        return
    if page_table is None:
        raise ValueError("scales belong to quantized keys and values in pages, got no page_table")
    if scales.shape != x.shape[:3] or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(
            f"scales must be contiguous float32 of the shape {tuple(x.shape[:3])}, got {scales.dtype} "
            f"{tuple(scales.shape)}"
        )
