// How each level multiplies a panel of 32 outputs' weights with tokens: the units of panels.h.
//
// Unit<INT8> multiplies int8 codes or numbers: bfloat16 at levels with bfloat16 dot products, float32 at others.
//   Element         type of weights and tokens in memory, 64 bytes per step
//   kTile           tokens of a tile; two tiles are multiplied at once
//   kSteps, kPanels, kPass: steps of a stretch, panels that share a stretch of tokens, and tokens that share panels, so that
//                   a panel fits into L1, and tokens and waiting sums into L2
//   arrange_weights lays out 16 outputs' weights of a step, 16 rows of 64 bytes, in place
//   kGranule        the number of steps in a stretch is a multiple of it, except in the last stretch
//   begin           initial value of the sums of a token, one row of X [inner]
//   arrange_tokens  lays out a tile's step, kTile rows of 64 bytes, in place
//   multiply        adds `count` steps to the sums of 32 outputs and two tiles, or initializes them if `fresh`
//   unfold          the sums as [token][output], in the given space or in place

#pragma once

#include "int_dot.h"
#include "linear.h"
#include "matrix_unit.h"

#if defined(AFNEXT_PANELS)

namespace afnext {

#if defined(AFNEXT_BFLOAT16)
using Number = bfloat16;
#else
using Number = float;
#endif
constexpr int64_t kNumbers = 64 / sizeof(Number);  // per step

// Shared parts of the units that use vectors.
struct VectorUnit {
#if defined(__AVX512F__)
  static constexpr int kRows = 8;  // tokens at once: twice as many sums hide the latency, and registers remain
  static constexpr int64_t kPanels = 8, kPass = 512;
#elif defined(__ARM_FEATURE_DOTPROD)
  static constexpr int kRows = 8;  // sums take 16 of 32 registers
  static constexpr int64_t kPanels = 4, kPass = 256;
#else
  static constexpr int kRows = 6;
  static constexpr int64_t kPanels = 4, kPass = 240;
#endif
  static constexpr int kTile = 2 * kRows;
  static constexpr int64_t kSteps = 8, kGranule = 1;
  static constexpr int kNextLanes =
      kLanes == 16 ? 1024 : 4 * kLanes;  // bytes to the weights of a panel's next kLanes outputs
  struct Configuration {
    Configuration() {}
  };

  static void arrange_tokens(uint8_t*) {}
  static const int32_t* unfold(const int32_t* sums, int32_t*) { return sums; }  // [2 * kTile tokens][32 outputs]
};

#if defined(AFNEXT_NEON)
// Adds the products of four consecutive words: weights(w) has those of 2 * kLanes outputs, token(i) those of a token.
template <int ROWS, typename Sum, typename Weights, typename Token>
inline void for_four_words(Weights weights, Token token, Sum (&total)[ROWS][2]) {
  Sum of[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) of[i] = load_as<Sum>(token(i));
  const auto add = [&](auto word) {
    constexpr int kWord = decltype(word)::value;
    const uint8_t* p = weights(kWord);
    const Sum by[2] = {load_as<Sum>(p), load_as<Sum>(p + VectorUnit::kNextLanes)};
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int w = 0; w < 2; ++w) total[i][w] = add_word<kWord>(total[i][w], by[w], of[i]);
  };
  add(std::integral_constant<int, 0>{});
  add(std::integral_constant<int, 1>{});
  add(std::integral_constant<int, 2>{});
  add(std::integral_constant<int, 3>{});
}
#endif

inline IntVec broadcast_ints(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return IntVec{} + four;
}

#if defined(AFNEXT_MMLA)

// An instruction multiplies two outputs with two tokens, eight bytes of each. So rows are stored in pairs, eight bytes
// of one and eight of the other in turn, and a vector of sums has two outputs by two tokens.
template <bool INT8>
struct Unit {
  using Element = std::conditional_t<INT8, int8_t, Number>;
  static constexpr int kTile = 8;
  static constexpr int64_t kSteps = 8, kGranule = 1, kPanels = 4, kPass = 256, kPanelBytes = kSteps * 2048;
  using Configuration = VectorUnit::Configuration;

  static void arrange_weights(uint8_t* tile) { arrange<16>(tile); }
  static void arrange_tokens(uint8_t* tile) { arrange<kTile>(tile); }
  template <typename X>
  static int32_t begin(const X*, int64_t) {
    return 0;
  }

  // sums: for each block of 8 outputs and each tile, the vectors of 4 pairs of outputs by 4 pairs of tokens.
  static void multiply(const uint8_t* panel, const uint8_t* const* tiles, const int32_t*, int64_t, int64_t tokens,
                       int64_t, int64_t count, bool fresh, int32_t* sums) {
    for (int block = 0; block < 4; ++block)
      for (int tile = 0; tile * kTile < tokens; ++tile)
        multiply_block(panel + block * 512, tiles[tile], count, fresh, sums + (block * 2 + tile) * 64);
  }

  // out[token][output] of 16 tokens and 32 outputs.
  static const int32_t* unfold(const int32_t* sums, int32_t* out) {
    for (int block = 0; block < 4; ++block)
      for (int tile = 0; tile < 2; ++tile)
        for (int output = 0; output < 8; output += 4)
          for (int token = 0; token < kTile; token += 2) {
            const int32_t* from = sums + (block * 2 + tile) * 64 + output * 8 + token * 2;
            const auto first = load_as<int32x4_t>(from), second = load_as<int32x4_t>(from + 16);
            int32_t* to = out + (tile * kTile + token) * 32 + block * 8 + output;
            vst1q_s32(to, vuzp1q_s32(first, second));
            vst1q_s32(to + 32, vuzp2q_s32(first, second));
          }
    return out;
  }

 private:
  using Sum = std::conditional_t<INT8, int32x4_t, float32x4_t>;

  template <int ROWS>
  static void arrange(uint8_t* tile) {
    for (int row = 0; row < ROWS; row += 2, tile += 128) {
      uint64x2_t pairs[2][4];
      std::memcpy(pairs, tile, sizeof pairs);
      for (int i = 0; i < 4; ++i) {
        const uint64x2_t both[2] = {vzip1q_u64(pairs[0][i], pairs[1][i]), vzip2q_u64(pairs[0][i], pairs[1][i])};
        std::memcpy(tile + i * 32, both, sizeof both);
      }
    }
  }

  static void multiply_block(const uint8_t* weights, const uint8_t* tokens, int64_t count, bool fresh, int32_t* sums) {
    Sum total[4][4];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) total[i][j] = fresh ? Sum{} : load_as<Sum>(sums + i * 16 + j * 4);
    for (int64_t step = 0; step < count; ++step, weights += 2048, tokens += kTile * 64)
#pragma GCC unroll 2
      for (int part = 0; part < 128; part += 16) {
        uint8x16_t by[4], of[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) by[i] = vld1q_u8(weights + i * 128 + part);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) of[j] = vld1q_u8(tokens + j * 128 + part);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) total[i][j] = add(total[i][j], by[i], of[j]);
      }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) std::memcpy(sums + i * 16 + j * 4, &total[i][j], sizeof(Sum));
  }

  static int32x4_t add(int32x4_t total, uint8x16_t weights, uint8x16_t tokens) {
    return vmmlaq_s32(total, vreinterpretq_s8_u8(weights), vreinterpretq_s8_u8(tokens));
  }
  static float32x4_t add(float32x4_t total, uint8x16_t weights, uint8x16_t tokens) {
    return vbfmmlaq_f32(total, vreinterpretq_bf16_u8(weights), vreinterpretq_bf16_u8(tokens));
  }
};

#elif defined(__AMX_INT8__)

// A tile is 16 rows of 64 bytes. The left operand is 16 outputs' weights in stored order. The right operand is 16
// tokens with four consecutive bytes of a token side by side. One step loads 4 KB for 64 cycles of multiplication, and
// L2 delivers half of that in this time: hence panels in L1. Tokens are loaded with the hint to bypass L1, because they
// would evict the panel.
template <bool INT8>
struct Unit {
  using Element = std::conditional_t<INT8, int8_t, Number>;
  static constexpr int kTile = 16;
  static constexpr int64_t kSteps = 16, kGranule = 1, kPanels = 16, kPass = 512, kPanelBytes = kSteps * 2048;
  using Configuration = TileConfiguration;

  static void arrange_weights(uint8_t*) {}
  static void arrange_tokens(uint8_t* tile) { transpose_tile((const uint32_t*)tile, (uint32_t*)tile); }
  template <typename X>
  static int32_t begin(const X*, int64_t) {
    return 0;
  }

  // sums[i][j]: 16 outputs by 16 tokens of int32 or float32, from output 16 i of the panel and the tokens of tiles[j].
  // Adds `count` steps to them, or initializes them if `fresh`. For the integers, see for_panels.
  static void multiply(const uint8_t* panel, const uint8_t* const* tiles, const int32_t*, int64_t, int64_t, int64_t,
                       int64_t count, bool fresh, int32_t* to) {
    auto* sums = (int32_t (*)[2][256])to;
    if (fresh) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sums[0][0], 64);
      _tile_loadd(1, sums[0][1], 64);
      _tile_loadd(2, sums[1][0], 64);
      _tile_loadd(3, sums[1][1], 64);
    }
    for (int64_t step = 0; step < count; ++step) {
      _tile_loadd(4, panel + step * 2048, 64);
      _tile_stream_loadd(6, tiles[0] + step * 1024, 64);
      _tile_stream_loadd(7, tiles[1] + step * 1024, 64);
      _tile_loadd(5, panel + step * 2048 + 1024, 64);
      if constexpr (INT8) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    _tile_stored(2, sums[1][0], 64);
    _tile_stored(3, sums[1][1], 64);
  }

  // out[token][output] of 32 tokens and 32 outputs.
  static const int32_t* unfold(const int32_t* sums, int32_t* out) {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        const auto* tile = (const uint32_t*)sums + (i * 2 + j) * 256;
        transpose_16([tile](int row) { return tile + row * 16; }, (uint32_t*)out + j * 16 * 32 + i * 16, 32);
      }
    return out;
  }
};

#else

// Vectors: outputs are the lanes, with four consecutive bytes of an output's weights in one lane, and the four bytes of
// a token are broadcast. In byte products of x86 one operand is unsigned: weights with 128 added, for which 128 times
// the sum of the token's bytes is subtracted. Plain AVX2 cannot multiply these without overflow, and takes int8 as
// pairs of 16-bit integers.
template <bool INT8>
struct Unit : VectorUnit {
#if defined(AFNEXT_BYTE_DOT)
  using Element = std::conditional_t<INT8, int8_t, Number>;
#else
  using Element = std::conditional_t<INT8, int16_t, Number>;
#endif
  static constexpr bool kUnsigned = sizeof(Element) == 1 && kWeightOffset != 0;
  static constexpr int64_t kPanelBytes = kSteps * 2048;

  static void arrange_weights(uint8_t* tile) {
    for (int i = 0; kUnsigned && i < 1024; ++i) tile[i] ^= 0x80;
    transpose_tile((const uint32_t*)tile, (uint32_t*)tile);
  }

  template <typename X>
  static int32_t begin(const X* row, int64_t inner) {
    int32_t total = 0;
    if constexpr (kUnsigned) {
      IntVec totals{};
      int64_t k = 0;
      for (; k + kBytes <= inner; k += kBytes) totals = add_dot(totals, UBytes{} + 1, (Bytes)load_bytes(row + k));
      for (; k < inner; ++k) total += row[k];
      total += afnext::sum(totals);
    }
    return -128 * total;
  }

  static void multiply(const uint8_t* panel, const uint8_t* const* tiles, const int32_t* begin, int64_t, int64_t tokens,
                       int64_t, int64_t count, bool fresh, int32_t* sums) {
    for (int output = 0; output < 32; output += 2 * kLanes)
      for (int token = 0; token < tokens; token += kRows)
        multiply_rows(panel + output / 16 * 1024 + output % 16 * 4, tiles[token / kTile] + token % kTile * 64,
                      begin + token, count, fresh, sums + token * 32 + output);
  }

 private:
  using Sum = std::conditional_t<INT8, IntVec, Vec>;
  using Operand = std::conditional_t<std::is_same_v<Element, float>, Vec, IntVec>;

  static void multiply_rows(const uint8_t* panel, const uint8_t* tokens, const int32_t* begin, int64_t count,
                            bool fresh, int32_t* sums) {
    Sum total[kRows][2];
    const auto for_sums = [](auto body) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int w = 0; w < 2; ++w) body(i, w);
    };
    for_sums([&](int i, int w) {
      total[i][w] = fresh ? Sum{} + (kUnsigned ? begin[i] : 0) : load_as<Sum>(sums + i * 32 + w * kLanes);
    });
#if defined(AFNEXT_NEON)
    for (int64_t step = 0; step < count; ++step, panel += 2048, tokens += kTile * 64)
      for (int part = 0; part < 64; part += 16)
        for_four_words([&](int word) { return panel + (part + word * 4) * 16; },
                       [&](int i) { return tokens + i * 64 + part; }, total);
#else
    for (int64_t step = 0; step < count; ++step, panel += 2048, tokens += kTile * 64)
      for (int part = 0; part < 64; part += 4) {
        __builtin_prefetch(tokens + kTile * 64 + part * kRows);  // for the next step, piece by piece
        const Operand by[2] = {load_as<Operand>(panel + part * 16), load_as<Operand>(panel + kNextLanes + part * 16)};
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Operand all = (Operand)broadcast_ints(tokens + i * 64 + part);
#pragma GCC unroll 2
          for (int w = 0; w < 2; ++w) total[i][w] = kept(add(total[i][w], by[w], all));
        }
      }
#endif
    for_sums([&](int i, int w) { std::memcpy(sums + i * 32 + w * kLanes, &total[i][w], sizeof(Sum)); });
  }

#if !defined(AFNEXT_NEON)
  static Sum add(Sum total, Operand weights, Operand token) {
    if constexpr (std::is_same_v<Element, float>) return total + weights * token;
    if constexpr (kUnsigned) return add_dot(total, (UBytes)weights, (Bytes)token);
    if constexpr (INT8 && !kUnsigned) return add_pairs(total, weights, token);
#if defined(__AVX512BF16__)
    if constexpr (!INT8) return (Vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)weights, (__m512bh)token);
#endif
  }
#endif
};

#endif

}  // namespace afnext

#endif
