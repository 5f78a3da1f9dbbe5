"""Merging of the parts into which the keys of a sequence are divided for `decode_attention`.

    log_sum = log2(sum_s 2^log_sums[s])          out = sum_s 2^(log_sums[s] - log_sum) * parts[s]

log_sums: base-2 logarithms of the sums of each part's softmax, -inf for a part without keys.

Few query rows per KV head (`MERGED_ROWS`): the program that is the last to write one of PARTS neighbouring parts merges
them into one, and the last to do so merges these results, so no other launch is needed and each of the two programs
reads a few parts only: 16 * PARTS rows of L2, not 16 * splits. For more rows, whose parts would take one program longer
than a launch takes, a separate kernel merges, one row per program.
"""

import torch
from torch import Tensor

from .configs import Config
from .counters import counters_of, is_last
from .online_softmax import weigh
from .triton_language import tl, triton

PARTS = 8  # merged by one program at a time
_PARTS = tl.constexpr(PARTS)
MERGED_ROWS = 16  # the most query rows of a program that merges


@triton.jit
def _merged_rows(  # type: ignore[no-untyped-def]
    parts,
    log_sums,
    first,
    count,
    row,
    rows,
    exists,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The rows `row` of `count` parts from `first` on, merged: [ROWS, BLOCK_D] and the logarithms of their sums."""
    channels = tl.arange(0, BLOCK_D)[None, :]
    mask = exists[:, None] & (channels < HEAD_DIM)
    # The lowest finite number rather than -inf, so that a row without keys does not compute inf - inf.
    row_max = tl.full(row.shape, -3.4028234663852886e38, tl.float32)
    row_sum = tl.zeros(row.shape, tl.float32)
    acc = tl.zeros((row.shape[0], BLOCK_D), tl.float32)
    at = first.to(tl.int64) * rows + row
    for _ in tl.range(0, count, loop_unroll_factor=AT_ONCE):
        log_sum = tl.load(log_sums + at, mask=exists, other=-float("inf"), cache_modifier=".cg")
        part = tl.load(parts + at[:, None] * HEAD_DIM + channels, mask=mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, log_sum)
        weight, decay = tl.exp2(log_sum - new_max), tl.exp2(row_max - new_max)
        acc = acc * decay[:, None] + part * weight[:, None]
        row_sum = row_sum * decay + weight
        row_max = new_max
        at += rows
    log_sum = tl.where(row_sum > 0, row_max + tl.log2(row_sum), -float("inf"))
    return acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None], log_sum


@triton.jit
def merge_by_last(  # type: ignore[no-untyped-def]
    parts,
    log_sums,
    out,
    counters,
    row,
    exists,
    splits,
    rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr = PARTS,
):
    """Write the rows `row` of `out`, if this program is the last to have written its part of them.

    A grid of (tiles of rows, splits, sequences). parts: [splits + groups, rows, HEAD_DIM] float32, log_sums: [splits +
    groups, rows], for groups of PARTS parts; counters: 1 + groups per tile; exists: which of `row` exist; AT_ONCE:
    parts loaded at a time, which takes registers.
    """
    groups = tl.cdiv(splits, _PARTS)
    group = tl.program_id(1) // _PARTS
    first = group * _PARTS
    count = tl.minimum(splits - first, _PARTS)
    counters += (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * (1 + groups)
    channels = tl.arange(0, BLOCK_D)[None, :]
    mask = exists[:, None] & (channels < HEAD_DIM)
    out_at = out + row[:, None].to(tl.int64) * HEAD_DIM + channels
    if is_last(counters + 1 + group, count):
        merged, log_sum = _merged_rows(parts, log_sums, first, count, row, rows, exists, HEAD_DIM, BLOCK_D, AT_ONCE)
        if groups == 1:
            tl.store(out_at, merged.to(out.dtype.element_ty), mask=mask)
        else:
            at = (splits + group).to(tl.int64) * rows + row
            tl.store(log_sums + at, log_sum, mask=exists)
            tl.store(parts + at[:, None] * HEAD_DIM + channels, merged, mask=mask)
            if is_last(counters, groups):
                merged, _ = _merged_rows(parts, log_sums, splits, groups, row, rows, exists, HEAD_DIM, BLOCK_D, AT_ONCE)
                tl.store(out_at, merged.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _merge_parts(  # type: ignore[no-untyped-def]
    parts, log_sums, out, splits, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Merge the parts of one row."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    channels = tl.arange(0, BLOCK_D)
    row_max = tl.full((1,), -3.4028234663852886e38, tl.float32)
    row_sum = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        part_row = split.to(tl.int64) * rows + row
        log_sum = tl.load(log_sums + part_row, mask=split < splits, other=-float("inf"))
        written = log_sum > -float("inf")
        mask = written[:, None] & (channels < HEAD_DIM)[None, :]
        part = tl.load(parts + part_row[:, None] * HEAD_DIM + channels[None, :], mask=mask, other=0.0)
        weights, decay, row_max, row_sum = weigh(log_sum[None, :], row_max, row_sum)
        acc = acc * decay[:, None] + tl.sum(part * tl.trans(weights), 0)[None, :]
    acc /= tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    out_at = out + row * HEAD_DIM + channels[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=(channels < HEAD_DIM)[None, :])


_MERGE = Config({"BLOCK_S": 32}, num_warps=4, num_stages=1)


class Parts:
    """Memory for the parts of one call, and how they are merged into `out`, like q.

    parts: float32 [splits, *q.shape], or `out` itself for one part; log_sums: float32, without the head_dim; counters:
    those with which the programs merge the parts, or None. Both tensors have more space for merged groups of parts.
    """

    def __init__(self, q: Tensor, owner: Tensor, splits: int, tiles: int, rows: int):
        """q: [..., head_dim]; owner: the tensor that the counters belong to; tiles: programs for each part, with `rows`
        query rows each."""
        self.out = q.new_empty(q.shape)
        self.parts, self.counters = self.out, None
        self._splits, groups = splits, 0
        if splits > 1 and rows <= MERGED_ROWS:
            groups = -(-splits // PARTS)
            self.counters = counters_of(owner, tiles * (1 + groups))
        if splits > 1:
            self.parts = q.new_empty((splits + groups, *q.shape), dtype=torch.float32)
        self.log_sums = q.new_empty((splits + groups, *q.shape[:-1]), dtype=torch.float32)

    def merged(self) -> Tensor:
        """The result, after the launch that wrote the parts."""
        if self._splits > 1 and self.counters is None:
            head_dim = self.out.shape[-1]
            block_d = max(16, triton.next_power_of_2(head_dim))
            sizes = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, **_MERGE.options()}
            grid = (self.out.numel() // head_dim,)
            _merge_parts[grid](self.parts, self.log_sums, self.out, self._splits, **sizes)
        return self.out
