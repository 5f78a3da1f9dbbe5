// Layouts of operands: transposed tiles and pairs, and the configuration of AMX.

#pragma once

#include "vec.h"

namespace afnext {

#if defined(__AVX2__)

// out[j][i] = rows[i][j] of 8 x 8 elements of 32 bits, `pitch` apart on both sides.
inline void transpose_8(const __m256 (&rows)[8], uint32_t* out, int64_t pitch) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps((float*)out + i * pitch, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    _mm256_storeu_ps((float*)out + (i + 4) * pitch, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  }
}

#endif

#if defined(__AVX512F__)

// out[j * pitch + i] = row(i)[j] of 16 x 16 elements of 32 bits; row(i) points to the 16 of row i.
template <typename Row>
inline void transpose_16(Row row, uint32_t* out, int64_t pitch) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(row(i));
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(out + i * pitch, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * pitch, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}

// One tile, rows and out contiguous.
inline void transpose_tile(const uint32_t* rows, uint32_t* out) {
  transpose_16([rows](int i) { return rows + i * 16; }, out, 16);
}

#elif defined(__AVX2__)

// One tile, rows and out contiguous; they may be the same.
inline void transpose_tile(const uint32_t* rows, uint32_t* out) {
  const auto load_block = [rows](int i, int j, __m256(&block)[8]) {
    for (int row = 0; row < 8; ++row) block[row] = _mm256_loadu_ps((const float*)rows + (i + row) * 16 + j);
  };
  __m256 first[8], second[8];
  for (int i = 0; i < 16; i += 8) {
    load_block(i, i, first);
    transpose_8(first, out + i * 17, 16);
  }
  load_block(0, 8, first);
  load_block(8, 0, second);
  transpose_8(first, out + 8 * 16, 16);
  transpose_8(second, out + 8, 16);
}

#endif

#if defined(AFNEXT_NEON)

// out[j * pitch + i] = row(i)[j] of 4 x 4 elements of 32 bits; row(i) points to the four of row i.
template <typename Row>
inline void transpose_4(Row row, uint32_t* out, int64_t pitch) {
  uint32x4_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = load_as<uint32x4_t>(row(i));
  const uint64x2_t even[2] = {(uint64x2_t)vtrn1q_u32(a[0], a[1]), (uint64x2_t)vtrn1q_u32(a[2], a[3])};
  const uint64x2_t odd[2] = {(uint64x2_t)vtrn2q_u32(a[0], a[1]), (uint64x2_t)vtrn2q_u32(a[2], a[3])};
  const uint64x2_t columns[4] = {vtrn1q_u64(even[0], even[1]), vtrn1q_u64(odd[0], odd[1]), vtrn2q_u64(even[0], even[1]),
                                 vtrn2q_u64(odd[0], odd[1])};
  for (int j = 0; j < 4; ++j) std::memcpy(out + j * pitch, &columns[j], sizeof columns[j]);
}

// One tile, rows and out contiguous; they may be the same.
inline void transpose_tile(const uint32_t* rows, uint32_t* out) {
  uint32_t copy[16 * 16];
  std::memcpy(copy, rows, sizeof copy);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 16; j += 4)
      transpose_4([&](int row) { return copy + (i + row) * 16 + j; }, out + j * 16 + i, 16);
}

#endif

#if defined(AFNEXT_MMLA)

// Eight neighbouring elements in bfloat16, from the even and the odd ones.
inline void store_pairs(bfloat16* p, Vec even, Vec odd) {
  const bfloat16x8_t halves = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)even), (float32x4_t)odd);
  const uint16x8_t bits = vreinterpretq_u16_bf16(halves);
  vst1q_u16((uint16_t*)p, vzip1q_u16(bits, vextq_u16(bits, bits, 4)));
}

#elif defined(__AVX512BF16__)

// 32 neighbouring elements in bfloat16, from the even and the odd ones.
inline void store_pairs(void* p, Vec even, Vec odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
}

#endif

#if defined(__AMX_TILE__)

// Configures the eight tiles for the calling thread, 16 rows of 64 bytes each, and restores the previous configuration.
class TileConfiguration {
 public:
  TileConfiguration() {
    _tile_storeconfig(&before_);
    asm volatile("" : "=m"(before_));  // gcc assumes that both instructions touch 8 of the 64 bytes
    Layout tiles{};
    tiles.palette = 1;
    for (int i = 0; i < 8; ++i) {
      tiles.row_bytes[i] = 64;
      tiles.rows[i] = 16;
    }
    load(tiles);
  }
  ~TileConfiguration() {
    if (before_.palette) {
      load(before_);
    } else {
      _tile_release();
    }
  }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;

 private:
  struct alignas(64) Layout {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };

  static void load(const Layout& tiles) {
    asm volatile("" ::"m"(tiles));
    _tile_loadconfig(&tiles);
  }

  Layout before_;
};

#endif

}  // namespace afnext
