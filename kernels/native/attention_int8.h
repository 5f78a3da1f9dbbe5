// Attention of many rows over an int8 cache with products of integers: see attention_int8.py for the maths.
//
// Queries become integers with one scale for each row. Keys and values keep their codes. The softmax is taken in blocks of
// kBlock keys: a row's weights, times the scales of the values, are integers relative to the largest of them in the block.
// Sums of integers are exact, so a row's result depends on nothing but its query and the keys it sees.
//
// The operands are words of 32 bits, each of kGroup neighbours along the inner dimension: the right one (queries or weights)
// in the lanes, unsigned where the instruction wants it, and the left one (keys or values) broadcast, or in tiles of AMX.

#pragma once

#include "attention_rows.h"
#include "fixed_point.h"
#include "int_dot.h"
#include "quantize_rows.h"

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
#define AFNEXT_INT8_ATTENTION

namespace afnext {

constexpr int kRun = 64;             // keys that are laid out at once
constexpr int64_t kMostDepth = 512;  // channels of a head
constexpr float kLeastScale = 1e-20f;

#if defined(__AVX2__)

typedef int32_t LooseVec __attribute__((vector_size(4 * kLanes), may_alias, aligned(4)));

// Pairs of 16 bits: queries of 15 bits, weights of 15 bits.
template <int W>
struct ShortUnits {
  using Element = int16_t;
  static constexpr int kRows = W * kLanes, kGroup = 2, kMostWeight = 32767, kQueryOffset = 0;
  static constexpr int kStep = kLanes >= 16 || W == 1 ? 8 : 4;  // broadcast at a time, so that no sum waits for another

  static float put_query(const float* row, int64_t depth, int16_t* codes) {
    return to_fixed_point(row, depth, codes).scale;
  }

  // Adds the products of a word and the W vectors at `right`.
  static void add(IntVec (&total)[W], const uint32_t* right, const IntVec (&by)[W], int32_t word) {
    const IntVec left = IntVec{} + word;
#if defined(__AVX512F__) || defined(__AVXVNNI__)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) total[w] = kept(add_pairs(total[w], by[w], left));
#else
    // One register is left for products if the last vector is read from memory. gcc would spill a sum.
    IntVec product;
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      if (w == 2) {
        asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
                     : "+x"(total[w]), "=&x"(product)
                     : "x"(left), "m"(*(const LooseVec*)(right + w * kLanes)));
      } else {
        asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
                     : "+x"(total[w]), "=&x"(product)
                     : "x"(left), "x"(by[w]));
      }
    }
#endif
  }
};

#endif

#if defined(AFNEXT_BYTE_DOT)

// Four bytes: queries of 8 bits, weights of 8 bits, or on ARM, where both operands are signed, of 7.
template <int W>
struct ByteUnits {
  using Element = int8_t;
  static constexpr int kRows = W * kLanes, kGroup = 4, kMostWeight = kWeightOffset ? 255 : 127;
  static constexpr int kQueryOffset = kWeightOffset;
  static constexpr int kStep = kLanes >= 16 || W == 1 ? 8 : 4;

  static float put_query(const float* row, int64_t depth, int8_t* codes) {
    float scale;
    quantize_row(row, codes, &scale, depth);
    for (int64_t d = 0; d < depth; ++d) codes[d] = (int8_t)(codes[d] + kQueryOffset);
    return scale;
  }

  static void add(IntVec (&total)[W], const uint32_t*, const IntVec (&by)[W], int32_t word) {
    const Bytes left = (Bytes)(IntVec{} + word);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) total[w] = kept(add_dot(total[w], (UBytes)by[w], left));
  }
};

#endif

// out[d] = the bytes or 16-bit integers of channel d of kGroup rows, the first in the lowest bits.
template <int kGroup>
inline void join_rows(const int8_t* const* rows, int64_t depth, uint32_t* out) {
  for (int64_t d = 0; d < depth; ++d) {
    if constexpr (kGroup == 2) {
      out[d] = (uint16_t)rows[0][d] | (uint32_t)(uint16_t)rows[1][d] << 16;
    } else {
      out[d] = (uint8_t)rows[0][d] | (uint32_t)(uint8_t)rows[1][d] << 8 | (uint32_t)(uint8_t)rows[2][d] << 16 |
               (uint32_t)(uint8_t)rows[3][d] << 24;
    }
  }
}

// Products whose left operand is broadcast, kStep words at a time.
template <typename Units>
struct Broadcasts : Units {
  using Units::kGroup;
  using Units::kRows;
  using Units::kStep;

  // keys[key / kStep][depth / kGroup][kStep]; `run` is the first key of kRun.
  static void put_keys(const int8_t* const* rows, int run, int64_t depth, uint32_t* keys) {
    const int64_t words = depth / kGroup;
    typename Units::Element row[kMostDepth];
    for (int i = 0; i < kRun; ++i) {
      for (int64_t d = 0; d < depth; ++d) row[d] = rows[i][d];
      uint32_t* to = keys + (run + i) / kStep * kStep * words + i % kStep;
      for (int64_t j = 0; j < words; ++j) std::memcpy(to + j * kStep, (const char*)row + 4 * j, 4);
    }
  }

  // values[d / kStep][key / kGroup][kStep]
  static void put_values(const int8_t* const* rows, int run, int64_t depth, uint32_t* values) {
    uint32_t joined[kMostDepth];
    for (int i = 0; i < kRun; i += kGroup) {
      join_rows<kGroup>(rows + i, depth, joined);
      uint32_t* to = values + (run + i) / kGroup * kStep;
      for (int64_t d = 0; d < depth; d += kStep) std::memcpy(to + d * (kBlock / kGroup), joined + d, 4 * kStep);
    }
  }

  // Calls put(key, w, sum) for `count` keys and a tile of queries. first: what the sums of each key begin with.
  template <typename Put>
  static void score(const uint32_t* keys, const uint32_t* queries, const int32_t* first, int count, int64_t depth,
                    Put put) {
    const int64_t words = depth / kGroup;
    for (int key = 0; key < count; key += kStep)
      product(keys + key * words, queries, words, first + key, [&](int i, int w, IntVec sum) { put(key + i, w, sum); });
  }

  // Calls put(d, w, sum) for every channel and a tile of weights of `count` keys.
  template <typename Put>
  static void accumulate(const uint32_t* values, const uint32_t* weights, int count, int64_t depth, Put put) {
    const int32_t zeros[kStep] = {};
    for (int64_t d = 0; d < depth; d += kStep)
      product(values + d * (kBlock / kGroup), weights, count / kGroup, zeros,
              [&](int i, int w, IntVec sum) { put(d + i, w, sum); });
  }

 private:
  // Calls put(i, w, sum) for left [words][kStep] and right [words][kRows].
  template <typename Put>
  static void product(const uint32_t* left, const uint32_t* right, int64_t words, const int32_t* first, Put put) {
    constexpr int W = kRows / kLanes;
    IntVec total[kStep][W];
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) total[i][w] = IntVec{} + first[i];
    for (int64_t j = 0; j < words; ++j) {
      IntVec by[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) by[w] = load_as<IntVec>(right + j * kRows + w * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kStep; ++i) Units::add(total[i], right + j * kRows, by, (int32_t)left[j * kStep + i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) put(i, w, total[i][w]);
  }
};

#if defined(__AMX_INT8__)

// AMX: 16 x 64 times 64 x 16 bytes at once. Both left operands are in tiles of one kilobyte.
template <int W>
struct ByteTiles : ByteUnits<W> {
  using ByteUnits<W>::kGroup;
  using ByteUnits<W>::kRows;
  static constexpr int kPitch = kRows * 4;  // bytes from one row of a right operand or a result to the next

  // keys[depth / 64][key][16]
  static void put_keys(const int8_t* const* rows, int run, int64_t depth, uint32_t* keys) {
    for (int64_t d = 0; d < depth; d += 64)
      for (int i = 0; i < kRun; ++i) std::memcpy(keys + d / kGroup * kBlock + (run + i) * 16, rows[i] + d, 64);
  }

  // values[key / 64][d][16]
  static void put_values(const int8_t* const* rows, int run, int64_t depth, uint32_t* values) {
    uint32_t joined[16][kMostDepth];
    for (int i = 0; i < 16; ++i) join_rows<kGroup>(rows + i * kGroup, depth, joined[i]);
    uint32_t* to = values + run / kGroup * depth;
    for (int64_t d = 0; d < depth; d += 16) transpose_16([&](int i) { return joined[i] + d; }, to + d * 16, 16);
  }

  template <typename Put>
  static void score(const uint32_t* keys, const uint32_t* queries, const int32_t* first, int count, int64_t depth,
                    Put put) {
    for (int key = 0; key < count; key += 32) {
      clear();
      for (int64_t d = 0; d < depth; d += 64) {
        load_tiles(keys + d / kGroup * kBlock + key * 16, queries + d / kGroup * kRows);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 5, 6);
        if constexpr (W == 2) {
          _tile_dpbsud(2, 4, 7);
          _tile_dpbsud(3, 5, 7);
        }
      }
      pass([&](int i, int w, IntVec sum) { put(key + i, w, sum + first[key + i]); });
    }
  }

  template <typename Put>
  static void accumulate(const uint32_t* values, const uint32_t* weights, int count, int64_t depth, Put put) {
    for (int64_t d = 0; d < depth; d += 32) {
      clear();
      for (int key = 0; key < count; key += 64) {
        load_tiles(values + key / kGroup * depth + d * 16, weights + key / kGroup * kRows);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 5, 6);
        if constexpr (W == 2) {
          _tile_dpbsud(2, 4, 7);
          _tile_dpbsud(3, 5, 7);
        }
      }
      pass([&](int i, int w, IntVec sum) { put(d + i, w, sum); });
    }
  }

 private:
  static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // Two left tiles, one after the other, and W right ones side by side.
  static void load_tiles(const uint32_t* left, const uint32_t* right) {
    _tile_loadd(4, left, 64);
    _tile_loadd(5, left + 256, 64);
    _tile_loadd(6, right, kPitch);
    if constexpr (W == 2) _tile_loadd(7, right + 16, kPitch);
  }

  // Calls put(i, w, sum) for the 32 rows of the sums.
  template <typename Put>
  static void pass(Put put) {
    alignas(64) int32_t sums[32 * kRows];
    _tile_stored(0, sums, kPitch);
    _tile_stored(1, sums + 16 * kRows, kPitch);
    if constexpr (W == 2) {
      _tile_stored(2, sums + 16, kPitch);
      _tile_stored(3, sums + 16 * kRows + 16, kPitch);
    }
    for (int i = 0; i < 32; ++i)
      for (int w = 0; w < W; ++w) put(i, w, load_as<IntVec>(sums + i * kRows + w * kLanes));
  }
};

#endif

// A thread's memory.
struct Int8Workspace {
  uint32_t *queries, *keys, *values, *weights;
  float *sums, *row_max, *row_sum, *row_scale, *scores, *key_scale, *value_log, *value_inverse, *wide;
  int32_t *last, *first;  // first: what a key's sums begin with
  int8_t* staged;         // [2 * kRun + 1][depth]; the last row is zero

  Int8Workspace(const Problem& p, int64_t depth, float* memory) {
    const int64_t rows = (p.row_block + 95) / 96 * 96;
    const uintptr_t address = (uintptr_t)memory;
    memory += ((64 - address % 64) % 64) / sizeof(float);
    const auto take = [&](int64_t floats) {
      float* taken = memory;
      memory += (floats + 15) / 16 * 16;
      return taken;
    };
    queries = (uint32_t*)take(rows * depth / 2);
    sums = take(rows * depth);
    for (float** row : {&row_max, &row_sum, &row_scale}) *row = take(rows);
    last = (int32_t*)take(rows);
    keys = (uint32_t*)take(kBlock * depth / 2);
    values = (uint32_t*)take(kBlock * depth / 2);
    scores = take(kBlock * kWide * kLanes);
    weights = (uint32_t*)take(kBlock * kWide * kLanes / 2);
    for (float** key : {&key_scale, &value_log, &value_inverse}) *key = take(kBlock);
    first = (int32_t*)take(kBlock);
    wide = take(depth);
    staged = (int8_t*)take((2 * kRun + 1) * depth / 4);
    std::memset(staged + 2 * kRun * depth, 0, depth);
  }
};

// Lays out the keys and values first .. first + count - 1, and zeros up to a multiple of kRun.
template <typename Products>
void load_int8_block(const Problem& p, const Task& task, int64_t first, int64_t count, int64_t depth,
                     Int8Workspace& work) {
  const int8_t *keys[kRun], *values[kRun], *zeros = work.staged + 2 * kRun * depth;
  Place place(p, task.b, first);
  const auto row_of = [&](const Cache& cache, int i) {
    const int8_t* row = (const int8_t*)cache.data + place.element(cache) + task.kv_head * cache.head;
    if (p.head_dim == depth) return row;
    int8_t* staged = work.staged + i * depth;
    std::memcpy(staged, row, p.head_dim);
    std::memset(staged + p.head_dim, 0, depth - p.head_dim);
    return (const int8_t*)staged;
  };
  for (int64_t run = 0; run < count; run += kRun) {
    for (int i = 0; i < kRun; ++i) {
      const int64_t key = run + i;
      float scale = 0;
      int32_t total = 0;
      if (key < count) {
        const int64_t at = (place.page() * p.page_size + place.slot()) * p.kv_heads + task.kv_head;
        keys[i] = row_of(p.keys, i);
        values[i] = row_of(p.values, kRun + i);
        work.key_scale[key] = p.keys.scales[at];
        scale = p.values.scales[at];
        for (int64_t d = 0; d < depth; ++d) total += keys[i][d];
        place.next();
      } else {
        keys[i] = values[i] = zeros;
        work.key_scale[key] = 0;
      }
      // Values of zero have the scale 0, whose logarithm would hide their weight from the sum of weights.
      scale = scale > kLeastScale ? scale : kLeastScale;
      work.value_log[key] = std::log2(scale);
      work.value_inverse[key] = 1 / scale;
      work.first[key] = -Products::kQueryOffset * total;
    }
    Products::put_keys(keys, (int)run, depth, work.keys);
    Products::put_values(values, (int)run, depth, work.values);
  }
}

// The task's queries as integers, in tiles, their scales, and each row's last visible key.
template <typename Products>
void load_int8_queries(const Problem& p, const Task& task, int64_t depth, Int8Workspace& work) {
  using Element = typename Products::Element;
  constexpr int kRows = Products::kRows;
  const int64_t end = task.first_row + task.rows - 1;
  const uint32_t* rows[kRows];
  std::fill_n(work.wide, depth, 0.0f);
  for (int64_t tile = 0; tile < task.rows; tile += kRows) {
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = std::min(task.first_row + tile + i, end);
      work.last[tile + i] = last_visible(p, task, row);
      load_query(p, task, row, std::min(row + kRows, end), work.wide);
      Element* codes = (Element*)work.keys + i * depth;  // not in use yet
      work.row_scale[tile + i] = Products::put_query(work.wide, depth, codes) * p.scale;
      rows[i] = (const uint32_t*)codes;
    }
    transpose<kRows>(rows, depth / Products::kGroup, work.queries + tile * depth / Products::kGroup);
  }
}

// Scores of a tile and a block, in base 2 and with the logarithms of the values' scales; most: the largest of each row.
template <typename Products>
void score_int8(const Int8Workspace& work, int64_t tile, int count, int64_t depth, float* most) {
  constexpr int kRows = Products::kRows, W = kRows / kLanes;
  Vec scale[W], largest[W];
  for (int w = 0; w < W; ++w) {
    scale[w] = load(work.row_scale + tile + w * kLanes);
    largest[w] = splat(kLowest);
  }
  Products::score(work.keys, work.queries + tile * depth / Products::kGroup, work.first, count, depth,
                  [&](int key, int w, IntVec sum) {
                    const Vec score = to_float(sum) * work.key_scale[key] * scale[w] + work.value_log[key];
                    store(work.scores + key * kRows + w * kLanes, score);
                    largest[w] = score > largest[w] ? score : largest[w];
                  });
  for (int w = 0; w < W; ++w) store(most + w * kLanes, largest[w]);
}

// A word of the weights of kGroup keys, added to `sum` without the values' scales.
template <typename Products>
inline IntVec weigh_keys(const Int8Workspace& work, const float* scores, int key, Vec most, Vec (&sum)[2]) {
  constexpr int kGroup = Products::kGroup, kBits = 32 / kGroup;
  IntVec word{};
#pragma GCC unroll 4
  for (int i = 0; i < kGroup; ++i) {
    const Vec weight = exp2_coarse(load(scores + (key + i) * Products::kRows) - most);
    sum[i % 2] += weight * work.value_inverse[key + i];
    const IntVec code = (IntVec)(weight * (float)Products::kMostWeight + 12582912.0f);  // rounded, in the lowest bits
    word |= (i + 1 < kGroup ? code & ((1 << kBits) - 1) : code) << (i * kBits);
  }
  return word;
}

// The softmax of a block of a tile: integer weights, and the factors by which the sums so far and those of this block are
// multiplied. most: the largest score of each row in the block.
template <typename Products>
void weigh_int8(const Int8Workspace& work, int64_t tile, int count, const float* most, Vec* decay, Vec* factor) {
  constexpr int kRows = Products::kRows;
  for (int w = 0; w < kRows / kLanes; ++w) {
    float *row_max = work.row_max + tile + w * kLanes, *row_sum = work.row_sum + tile + w * kLanes;
    const Vec before = load(row_max), here = load(most + w * kLanes), now = before > here ? before : here;
    decay[w] = exp2(before - now);
    factor[w] = exp2(here - now);
    Vec sum = load(row_sum) * decay[w];
    for (int run = 0; run < count; run += kRun) {
      Vec part[2] = {};
      for (int key = run; key < run + kRun; key += Products::kGroup) {
        const IntVec word = weigh_keys<Products>(work, work.scores + w * kLanes, key, here, part);
        std::memcpy(work.weights + key / Products::kGroup * kRows + w * kLanes, &word, sizeof word);
      }
      sum += (part[0] + part[1]) * factor[w];
    }
    store(row_max, now);
    store(row_sum, sum);
    factor[w] *= 1.0f / Products::kMostWeight;
  }
}

template <typename Products>
void attend_int8_in_tiles(const Problem& p, const Task& task, float* memory) {
  constexpr int kRows = Products::kRows;
  const int64_t depth = (p.head_dim + 63) / 64 * 64, padded = (task.rows + kRows - 1) / kRows * kRows;
  Int8Workspace work(p, depth, memory);
  load_int8_queries<Products>(p, task, depth, work);
  std::fill_n(work.row_max, padded, kLowest);
  std::fill_n(work.row_sum, padded, 0.0f);
  std::fill_n(work.sums, padded * depth, 0.0f);
  const int64_t end = std::min<int64_t>(task.end_key, work.last[padded - 1] + 1);
  for (int64_t first = 0; first < end; first += kBlock) {
    const int64_t keys = std::min<int64_t>(kBlock, end - first);
    load_int8_block<Products>(p, task, first, keys, depth, work);
    const int count = (int)((keys + kRun - 1) / kRun * kRun);
    for (int64_t tile = 0; tile < padded; tile += kRows) {
      const int32_t* last = work.last + tile;
      if (last[kRows - 1] < first) continue;
      float most[kRows];
      score_int8<Products>(work, tile, count, depth, most);
      if (first + count - 1 > std::min<int64_t>(last[0], end - 1)) {
        int32_t bounded[kRows];
        for (int i = 0; i < kRows; ++i) bounded[i] = std::min<int64_t>(last[i], end - 1);
        std::fill_n(most, kRows, kLowest);
        mask<Products>(bounded, first, count, work.scores, most);
      }
      Vec decay[kRows / kLanes], factor[kRows / kLanes];
      weigh_int8<Products>(work, tile, count, most, decay, factor);
      float* sums = work.sums + tile * depth;
      Products::accumulate(work.values, work.weights, count, depth, [&](int64_t d, int w, IntVec sum) {
        float* at = sums + d * kRows + w * kLanes;
        store(at, load(at) * decay[w] + to_float(sum) * factor[w]);
      });
    }
  }
  finish<kRows>(p, task, depth, work);
}

template <template <int> typename Products>
void attend_int8_in_tiles(const Problem& p, const Task& task, float* memory) {
  task.rows <= kLanes ? attend_int8_in_tiles<Products<1>>(p, task, memory)
                      : attend_int8_in_tiles<Products<kWide>>(p, task, memory);
}

#if defined(__AVX2__)
template <int W>
using ShortBroadcasts = Broadcasts<ShortUnits<W>>;
#endif
#if defined(AFNEXT_BYTE_DOT)
template <int W>
using ByteBroadcasts = Broadcasts<ByteUnits<W>>;
#endif

// Whether the task is computed here.
inline bool takes_int8(const Problem& p) {
  if (p.cache_dtype != kInt8 || p.parts || p.head_dim > kMostDepth) return false;
#if defined(__AVX2__) && !defined(__AVX512BF16__)
  if (p.dtype == kBFloat16) return true;  // products of 16 bits are faster than those of floats, and as accurate
#endif
  return p.rounds;
}

inline void attend_int8(const Problem& p, const Task& task, float* memory) {
#if defined(__AMX_INT8__)
  attend_int8_in_tiles<ByteTiles>(p, task, memory);
#elif defined(AFNEXT_BYTE_DOT)
#if defined(__AVX2__)
  if (!p.rounds) return attend_int8_in_tiles<ShortBroadcasts>(p, task, memory);
#endif
  attend_int8_in_tiles<ByteBroadcasts>(p, task, memory);
#else
  attend_int8_in_tiles<ShortBroadcasts>(p, task, memory);
#endif
}

}  // namespace afnext

#endif
