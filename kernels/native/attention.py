"""Calls the native attention kernel, for many queries and for few.

A task is a block of rows (queries and the heads of one KV head) of one sequence and, if the keys are divided, one part
of the keys. It converts and lays out a block of 256 keys and values once for all its rows; the softmax is online, in
float32 and base 2. Rows are the lanes of its vectors, so there are no sums across lanes. bfloat16 is multiplied by AMX
if the CPU has it, else in pairs by AVX512-BF16 if it has that, and an int8 cache by integers (`attention_int8.h`);
everything else is multiplied in float32.
The few rows of a decoded token read bfloat16, int8, e4m3 and int4 keys in place. int4 keys and values
(`int4_cache.py`) are transformed back during layout for many rows; for few, the queries and the sums of values are
transformed instead.
Parts of the keys are merged by the maxima and sums of their softmax (Flash-Decoding). Results do not depend on the
number of threads.
Source: Dao 2023 (FlashAttention-2); Dao et al. 2023 (Flash-Decoding).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..strides import with_unit_stride
from . import call
from .recording import current, scratch
from .threads import thread_count

if TYPE_CHECKING:
    from ..int4_cache import KeyBias
    from ..rotary import Rotation

BLOCK_VALUES = 131072
"""The most values in the queries of a task of many rows, so that they fit in the L2 cache."""


def attend_natively(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    rotation: "Rotation | None",
    key_bias: "KeyBias | None" = None,
    *,
    row_block: int,
    part_keys: int | None = None,
    rounds: bool = False,
) -> Tensor:
    """Run the native kernel, in tasks of `row_block` rows of a KV head and, if given, of `part_keys` keys."""
    q, k, v = map(with_unit_stride, (q, k, v))
    batch, queries, heads, head_dim = q.shape
    page_size, kv_heads = k.shape[1:3]
    out = q.new_empty(q.shape)
    if q.numel() == 0:
        return out
    keys = page_size
    if key_lengths is not None:
        key_lengths = key_lengths.to(torch.int64).contiguous()
        held = page_size * (1 if page_table is None else page_table.shape[1])
        # A recording is repeated with longer sequences later.
        keys = int(key_lengths.max()) if current() is None else held
        if keys > held:
            raise ValueError(f"sequences of up to {keys} tokens, and room for {held} in their keys or pages")
    if page_table is not None:
        page_table = with_unit_stride(page_table.to(torch.int32))
    cos, sin = (None, None) if rotation is None else rotation.cos_sin
    parts, sums = None, None
    if part_keys is not None:
        rows_of_parts = batch * heads * queries * -(-keys // part_keys)
        parts = scratch("parts", rows_of_parts, head_dim)
        sums = scratch("sums", rows_of_parts, 2)
    workspace = scratch("workspace", thread_count(), _workspace_floats(row_block, head_dim))
    k_bias, key_cos, key_sin = (None, None, None) if key_bias is None else (key_bias.bias, key_bias.cos, key_bias.sin)
    if key_cos is not None and current() is None and keys > len(key_cos):
        raise ValueError(f"sequences of up to {keys} tokens, and a key_bias with the angles of {len(key_cos)}")
    call(
        "attention",
        q,
        k,
        v,
        out,
        k_scales,
        v_scales,
        k_bias,
        key_cos,
        key_sin,
        cos,
        sin,
        key_lengths,
        page_table,
        workspace,
        parts,
        sums,
        batch,
        queries,
        heads,
        kv_heads,
        head_dim,
        keys,
        page_size,
        0 if page_table is None else page_table.stride(0),
        0 if key_cos is None else key_cos.stride(0),
        0 if cos is None else cos.shape[-1],
        rotation is not None and rotation.pairing == "half",
        causal,
        k.dtype == torch.uint8,  # int4 cache, two codes per byte
        k.dtype == torch.float8_e4m3fn,
        rounds,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        row_block,
        part_keys or 0,
        workspace.shape[1],
        float(scale),
        q.dtype,
    )
    return out


def workspace_bytes(rows: int, head_dim: int) -> int:
    """The most that the workspace takes, for torch's number of threads and `rows` query rows per KV head."""
    return 4 * torch.get_num_threads() * _workspace_floats(min(rows, BLOCK_VALUES // head_dim + 1), head_dim)


def _workspace_floats(row_block: int, head_dim: int) -> int:
    """Workspace of a thread, in floats: queries and sums, their maxima, a block of keys and values, scores."""
    depth, rows, block = -(-head_dim // 64) * 64, -(-row_block // 96) * 96, 256  # whole tiles of 8, 16, 24 or 32 rows
    return 2 * rows * depth + 3 * rows + 2 * block * depth + 2 * block * 32 + 33 * depth + 16
