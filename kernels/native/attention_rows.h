// The first and the last step of a task of many rows: loading a query, and writing the results.

#pragma once

#include "attention_task.h"
#include "rows.h"

namespace afnext {

// Prefetches a row that is read soon: rows are too far apart for the hardware prefetcher.
template <typename From>
inline void prefetch(const From* row, int64_t count) {
  for (int64_t d = 0; d < count; d += 64 / (int64_t)sizeof(From)) __builtin_prefetch(row + d);
}

// A row's query as floats, rotated. ahead: a row that is loaded soon.
inline void load_query(const Problem& p, const Task& task, int64_t row, int64_t ahead, float* wide) {
  with_dtype(p.dtype, [&](auto zero) {
    const auto* from = (const decltype(zero)*)p.q;
    prefetch(from + query_offset(p, task, ahead), p.head_dim);
    convert(from + query_offset(p, task, row), p.head_dim, p.sign, wide);
  });
  const int64_t token = task.b * p.queries + row / p.group();
  if (p.cos) rotate(wide, p.cos + token * p.pairs, p.sin + token * p.pairs, p.pairs, p.half);
}

// Writes the task's result: divided by the sums of its weights to `out`, or unnormalized to `parts`. work.sums: for each
// tile of kRows rows, [depth][kRows].
template <int kRows, typename Work>
void finish(const Problem& p, const Task& task, int64_t depth, const Work& work) {
  const int64_t group = p.group();
  const int64_t parts = ((task.b * p.kv_heads + task.kv_head) * p.part_count() + task.part) * p.rows();
  for (int64_t tile = 0; tile < task.rows; tile += kRows) {
    const int64_t count = std::min<int64_t>(kRows, task.rows - tile);
    const float* sums = work.sums + tile * depth;
    for (int64_t d = 0; d < p.head_dim; d += 16) {
      const uint32_t* from[16];
      float turned[kRows * 16];
      for (int i = 0; i < 16; ++i) from[i] = (const uint32_t*)(sums + (d + i) * kRows);
      transpose<16>(from, kRows, (uint32_t*)turned);
      const int64_t channels = std::min<int64_t>(16, p.head_dim - d);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = task.first_row + tile + i;
        if (p.parts) {
          std::memcpy(p.parts + (parts + row) * p.head_dim + d, turned + i * 16, channels * sizeof(float));
          continue;
        }
        const float sum = work.row_sum[tile + i];
        const int64_t token = task.b * p.queries + row / group;
        const int64_t offset = (token * p.heads + task.kv_head * group + row % group) * p.head_dim + d;
        with_dtype(p.dtype, [&](auto zero) {
          convert(turned + i * 16, channels, sum > 0 ? 1 / sum : 0, (decltype(zero)*)p.out + offset);
        });
      }
    }
    for (int64_t i = 0; p.parts && i < count; ++i) {
      float* statistics = p.statistics + (parts + task.first_row + tile + i) * 2;
      statistics[0] = work.row_max[tile + i];
      statistics[1] = work.row_sum[tile + i];
    }
  }
}

}  // namespace afnext
