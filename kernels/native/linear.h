// Shared parts of products: the conversion of activations, few rows in float32, and the epilogue
//     out[row, n] = y + bias[n] + residual[row, n],    for a SwiGLU pair y = silu(gate) * up.

#pragma once

#include <algorithm>
#include <type_traits>

#include "exponential.h"
#include "shared_loop.h"

namespace afnext {

// Prefetches the weights in memory order, as one stream, for any number C of outputs that are summed at once. For
// several outputs: while a tile is read, the tile after the next goes into L2, which allows more outstanding reads than
// L1. For one output: a page ahead, into L1.
template <int C>
class Ahead {
 public:
  // tile: of the weights of all outputs that are summed at once, bytes.
  Ahead(const void* weights, int64_t tile) : next_((const char*)weights + (C == 1 ? 4096 : 2 * tile)) {}

  // Continues by this many bytes.
  void read(int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(next_ + i, 0, C == 1 ? 3 : 2);
    next_ += bytes;
  }

 private:
  const char* next_;
};

template <typename T>
inline void to_floats(const T* x, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
  for (; i < count; ++i) out[i] = to_float(x[i]);
}

// The epilogue. y, and for a SwiGLU pair up, are [outputs, rows].
template <typename T>
class Epilogue {
 public:
  const float* bias;  // or null
  const T* residual;  // or null
  T* out;
  int64_t columns;
  bool pair = false;

  // `outputs` outputs of all rows from n on, at most kOutputBlock; y is overwritten.
  void operator()(int64_t n, int64_t outputs, int64_t rows, float* y, const float* up) const {
    const int64_t all = outputs * rows;
    for (int64_t i = 0; up && i < all; i += kLanes) {
      const int count = (int)std::min<int64_t>(kLanes, all - i);
      const Vec gated = silu(first_of(y + i, count)) * first_of(up + i, count);
      count == kLanes ? store(y + i, gated) : store_first(y + i, gated, count);
    }
    if (rows == 1) {
      const Vec sums[1] = {first_of(y, (int)outputs)};
      return (*this)(0, n, (int)outputs, sums);
    }
    for (int64_t i = 0; i < outputs; ++i)
      for (int64_t row = 0; row < rows; ++row) put(row, n + i, y[i * rows + row]);
  }

  // `count` outputs of one row from n on, at most kLanes, from the sums of one matrix or of a pair.
  template <int MATRICES>
  void operator()(int64_t row, int64_t n, int count, const Vec (&sums)[MATRICES]) const {
    const int64_t at = row * columns + n;
    Vec y = sums[0];
    if constexpr (MATRICES == 2) y = silu(y) * sums[1];
    if (bias) y += first_of(bias + n, count);
    if (residual) y += first_of(residual + at, count);
    if (count == kLanes) {
      store(out + at, y);
    } else {
      store_first(out + at, y, count);
    }
  }

 private:
  template <typename From>
  static Vec first_of(const From* p, int count) {
    return count == kLanes ? load(p) : load_first(p, count);
  }

  void put(int64_t row, int64_t n, float y) const {
    const int64_t at = row * columns + n;
    if (bias) y += bias[n];
    if (residual) y += to_float(residual[at]);
    from_float(out + at, y);
  }
};

// y[c, r] = sum_k x[r, k] * weight[c, k] for C outputs and R rows, y `pitch` apart. With vectors of 8, every element is
// one sum in the order of k, so a row has the same bits in every tile; kernels/native/products.py relies on this.
template <int C, int R, typename T>
inline void dot(const T* weight, const float* x, int64_t inner, float* y, int64_t pitch) {
  // Number of independent sums. AVX2 needs four to hide latency, which one row of four outputs has.
  constexpr int kSums = kLanes == 8 ? 1 : C * R == 1 ? 4 : C * R <= 4 ? 2 : 1;
  Vec total[C][R][kSums] = {};
  Ahead<C> ahead(weight, C * inner * sizeof(T));
  const auto add = [&](int64_t k, int s, const auto& part) {
    Vec w[C];
    for (int c = 0; c < C; ++c) w[c] = part(weight + c * inner + k);
    for (int r = 0; r < R; ++r) {
      const Vec v = part(x + r * inner + k);
      for (int c = 0; c < C; ++c) total[c][r][s % kSums] += w[c] * v;
    }
  };
  const auto whole = [](const auto* p) { return load(p); };
  int64_t k = 0;
  for (; k + 4 * kLanes <= inner; k += 4 * kLanes) {
    ahead.read(C * 4 * kLanes * sizeof(T));
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) add(k + s * kLanes, s, whole);
  }
  for (; k + kLanes <= inner; k += kLanes) add(k, 0, whole);
  const int rest = (int)(inner - k);
  if (rest) add(k, 0, [rest](const auto* p) { return load_first(p, rest); });
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) {
      for (int s = 1; s < kSums; ++s) total[c][r][0] += total[c][r][s];
      y[c * pitch + r] = sum(total[c][r][0]);
    }
}

constexpr int kOutputBlock = 4;

// Calls body(n, count, scratch) for blocks of up to kOutputBlock outputs from n on, each thread with its own scratch of
// `scratch` floats, initially zero. work: total multiplications.
template <typename Body>
inline void for_outputs(int64_t columns, int64_t work, int64_t scratch, int64_t threads, Body body) {
  constexpr int64_t kWorthAThread = 1 << 15, kChunk = 1 << 18;  // multiplications; a chunk takes 10 to 50 us
  const int64_t blocks = (columns + kOutputBlock - 1) / kOutputBlock;
  const int count = (int)std::max<int64_t>(1, std::min({threads, blocks, work / kWorthAThread}));
  SharedLoop loop(blocks, std::max<int64_t>(1, blocks * kChunk / std::max<int64_t>(1, work)), count);
#pragma omp parallel num_threads(count)
  {
    Scratch<float> own(scratch);
    std::memset(own, 0, scratch * sizeof(float));
    loop.run([&](int64_t first, int64_t end) {
      for (int64_t n = first * kOutputBlock; n < std::min(columns, end * kOutputBlock); n += kOutputBlock)
        body(n, std::min<int64_t>(kOutputBlock, columns - n), (float*)own);
    });
  }
}

// Divides a block of `outputs` and all rows into tiles whose sums fit in registers: calls tile(C, R, n, row) with
// constants C outputs from n and R rows. Several rows share loads of weights, and several outputs share loads of rows,
// of `row_bytes` each. On AVX-512, one row that stays in L1 needs no sharing: with one output at a time the weights are
// read strictly in order, which is fastest.
template <typename Tile>
inline void for_tiles(int64_t outputs, int64_t rows, int64_t row_bytes, Tile tile) {
  const bool one_by_one = kLanes == 16 && row_bytes <= 24 << 10;
  const auto across = [&](auto height, int64_t row) {
    constexpr int R = decltype(height)::value, C = R > 1 ? 2 : 4;
    int64_t n = 0;
    for (; n + C <= outputs && !(R == 1 && one_by_one); n += C) tile(std::integral_constant<int, C>{}, height, n, row);
    for (; n < outputs; ++n) tile(std::integral_constant<int, 1>{}, height, n, row);
  };
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) across(std::integral_constant<int, 4>{}, row);
  switch (rows - row) {
    case 1: return across(std::integral_constant<int, 1>{}, row);
    case 2: return across(std::integral_constant<int, 2>{}, row);
    case 3: return across(std::integral_constant<int, 3>{}, row);
  }
}

}  // namespace afnext
