// Products of a few rows with int4 weights in groups, scales[n, g] * (code[n, k] - zeros[n, g]), read once from memory.
//
// A lane holds the eight codes of a four-byte word, which are of one group. Sums are made with the codes as they are
// stored or less 8, and what is missing to zeros[n, g] times the sum of the group's activations is subtracted at the end.
//
// float32 and float16 activations, and all without AVX2: codes become float32. bfloat16 activations on AVX2 and up: those
// of a group become integers.

#include "fixed_point.h"
#include "int_dot.h"
#include "linear.h"
#include "panels.h"

namespace afnext {
namespace {

constexpr int kChunk = 8 * kLanes;  // inputs of a vector of words

inline BitVec load_words(const uint8_t* p, int64_t left) {
  BitVec words{};
  std::memcpy(&words, p, left < (int64_t)sizeof words ? left : sizeof words);
  return words;
}

// Gives each lane the value of the group that its codes are of, from values of neighbouring groups.
template <bool ONE_GROUP>
class Spread {
 public:
  // lanes: of a group, a power of two from 4; at least kLanes if ONE_GROUP.
  explicit Spread(int64_t lanes) : shift_(lanes == 4 ? 2 : lanes == 8 ? 3 : 4) {
    for (int i = 0; i < kLanes; ++i) source_[i] = i >> shift_;
  }

  // values: of all groups, kLanes readable from each.
  Vec operator()(const float* values, int64_t chunk) const {
    const float* first = values + (kLanes == 16 && ONE_GROUP ? chunk : chunk * kLanes >> shift_);
#if defined(__AVX512F__)
    if constexpr (!ONE_GROUP) return (Vec)_mm512_permutexvar_ps((__m512i)source_, (__m512)load(first));
#elif defined(__AVX2__)
    if constexpr (!ONE_GROUP) return (Vec)_mm256_permutevar8x32_ps((__m256)load(first), (__m256i)source_);
#endif
    return splat(*first);
  }

 private:
  int shift_;
  IntVec source_;
};

// Of each row and group, the scale and the sum of its activations; zeros behind the last group, for whole vectors.
class Groups {
 public:
  Groups(int64_t rows, int64_t groups)
      : padded_((groups + 31) / 16 * 16), scales_(rows * padded_), sums_(rows * padded_) {
    for (int64_t i = 0; i < rows * padded_; ++i) scales_[i] = sums_[i] = 0;
  }

  int64_t padded() const { return padded_; }
  float* scales(int64_t row) const { return scales_ + row * padded_; }
  float* sums(int64_t row) const { return sums_ + row * padded_; }

 private:
  int64_t padded_;
  Scratch<float> scales_, sums_;
};

// Activations as float32: word w of a chunk holds the inputs 8 w .. 8 w + 7, its t-th code stands in vector t.
class FloatRows {
 public:
  static constexpr int kOffset = 8;  // taken from the codes, so that less cancels out

  template <typename T>
  FloatRows(const T* x, int64_t rows, int64_t inner, int64_t group)
      : groups(rows, inner / group), pitch_((inner + kChunk - 1) / kChunk * kChunk), values_(rows * pitch_) {
    std::memset(values_, 0, rows * pitch_ * sizeof(float));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < inner; ++k) {
        const float value = to_float(x[row * inner + k]);
        values_[row * pitch_ + k / kChunk * kChunk + k % 8 * kLanes + k % kChunk / 8] = value;
        groups.scales(row)[k / group] = 1;
        groups.sums(row)[k / group] += value;
      }
  }

  static constexpr int64_t kStep = kChunk;  // elements of a row's chunk

  const float* row(int64_t index) const { return values_ + index * pitch_; }
  int64_t row_bytes() const { return pitch_ * sizeof(float); }
  int64_t pitch() const { return pitch_; }

  // sums[c][r] = codes * x in each lane, of the words of C outputs and a chunk of R rows `pitch` apart.
  template <int C, int R>
  static void dot(const BitVec* words, const float* x, int64_t pitch, Vec (*sums)[R]) {
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) sums[c][r] = Vec{};
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t)
      for (int c = 0; c < C; ++c) {
        const Vec codes = to_float((IntVec)((words[c] >> (4 * t)) & 15) - kOffset);
        for (int r = 0; r < R; ++r) sums[c][r] += codes * load(x + r * pitch + t * kLanes);
      }
  }

  Groups groups;

 private:
  int64_t pitch_;
  Scratch<float> values_;
};

#if defined(__AVX2__)
// Activations as integers of 15 bits, a scale a group: of each chunk the high bytes of the even inputs, their low bytes,
// the high bytes of the odd inputs, their low bytes.
class FixedRows {
 public:
  static constexpr int kOffset = 0;

  template <typename T>
  FixedRows(const T* x, int64_t rows, int64_t inner, int64_t group)
      : groups(rows, inner / group), pitch_((inner + kChunk - 1) / kChunk * 2 * kChunk), bytes_(rows * pitch_) {
    std::memset(bytes_, 0, rows * pitch_);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < inner; k += group) round_group(x + row * inner + k, group, row, k);
  }

  static constexpr int64_t kStep = 2 * kChunk;

  const int8_t* row(int64_t index) const { return bytes_ + index * pitch_; }
  int64_t row_bytes() const { return pitch_; }
  int64_t pitch() const { return pitch_; }

  template <int C, int R>
  static void dot(const BitVec* words, const int8_t* x, int64_t pitch, Vec (*sums)[R]) {
    UBytes even[C], odd[C];
    for (int c = 0; c < C; ++c) {
      even[c] = (UBytes)(words[c] & 0x0F0F0F0F);
      odd[c] = (UBytes)((words[c] >> 4) & 0x0F0F0F0F);
    }
    for (int r = 0; r < R; ++r) {
      Bytes part[4];
      for (int i = 0; i < 4; ++i) part[i] = (Bytes)load_bytes(x + r * pitch + i * kBytes);
      for (int c = 0; c < C; ++c) {
        const IntVec high = add_dot(add_dot(IntVec{}, even[c], part[0]), odd[c], part[2]);
        const IntVec low = add_dot(add_dot(IntVec{}, even[c], part[1]), odd[c], part[3]);
        sums[c][r] = to_float((high << 7) + low);
      }
    }
  }

  Groups groups;

 private:
  template <typename T>
  void round_group(const T* x, int64_t group, int64_t row, int64_t first) {
    alignas(64) int16_t codes[128];
    const FixedPoint rounded = to_fixed_point(x, group, codes);
    groups.scales(row)[first / group] = rounded.scale;
    groups.sums(row)[first / group] = rounded.scale * rounded.total;
    for (int64_t i = 0; i < group; i += 2 * kLanes) {  // a lane holds a pair of neighbours
      const IntVec pairs = (IntVec)load_words((const uint8_t*)(codes + i), sizeof pairs);
      const int64_t k = first + i;
      int8_t* at = bytes_ + row * pitch_ + k / kChunk * 2 * kChunk + k % kChunk / 2;
      put_bytes(pairs << 16 >> 16, at, at + kBytes);
      put_bytes(pairs >> 16, at + 2 * kBytes, at + 3 * kBytes);
    }
  }

  int64_t pitch_;
  Scratch<int8_t> bytes_;
};
#endif

// Scales and zeros are of the dtype `kind`.
struct Weight {
  const uint8_t* codes;  // or null
  const void* scales;
  const void* zeros;  // or null for 8
  int64_t kind;
};

// products[g] = scale * that of the row's activations, for all groups of output n; returns what the zeros take from the
// sum, sum_g scale * (zero - offset) * sum of the row's activations.
template <typename S>
float weigh_groups(const S* scales, const S* zeros, int64_t count, float offset, const float* row_scales,
                   const float* row_sums, float* products) {
  Vec shift{};
  const auto step = [&](int64_t g, Vec scale, Vec zero) {
    store(products + g, scale * load(row_scales + g));
    shift += scale * (zero - offset) * load(row_sums + g);
  };
  int64_t g = 0;
  for (; g + kLanes <= count; g += kLanes) step(g, load(scales + g), zeros ? load(zeros + g) : splat(8));
  const int rest = (int)(count - g);
  if (rest) step(g, load_first(scales + g, rest), zeros ? load_first(zeros + g, rest) : splat(8));
  return sum(shift);
}

// y[c, r] for C outputs from n on and R rows from `row` on, y `pitch` apart; products: [C * R, padded] floats, finite.
template <bool ONE_GROUP, int C, int R, typename Rows>
void dot(const Weight& weight, int64_t n, const Rows& x, int64_t row, int64_t count, int64_t group, float* products,
         float* y, int64_t pitch) {
  const Spread<ONE_GROUP> spread(group / 8);
  const int64_t padded = x.groups.padded(), half = count * group / 2;
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r)
      with_dtype(weight.kind, [&](auto zero) {
        using S = const decltype(zero);
        const int64_t first = (n + c) * count;
        y[c * pitch + r] = -weigh_groups((S*)weight.scales + first, weight.zeros ? (S*)weight.zeros + first : nullptr, count,
                                         Rows::kOffset, x.groups.scales(row + r), x.groups.sums(row + r),
                                         products + (c * R + r) * padded);
      });
  Vec total[C][R] = {};
  const uint8_t* codes = weight.codes + n * half;
  const auto* activations = x.row(row);
  const int64_t pitch_x = x.pitch();
  const auto add = [&](int64_t chunk, int64_t left) {
    BitVec words[C];
    for (int c = 0; c < C; ++c) words[c] = load_words(codes + c * half + chunk * kChunk / 2, left);
    Vec sums[C][R];
    Rows::template dot<C, R>(words, activations + chunk * Rows::kStep, pitch_x, sums);
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) total[c][r] += sums[c][r] * spread(products + (c * R + r) * padded, chunk);
  };
  const int64_t whole = 2 * half / kChunk, left = half - whole * kChunk / 2;
  for (int64_t chunk = 0; chunk < whole; ++chunk) {
    for (int c = 0; c < C; ++c) __builtin_prefetch(codes + c * half + chunk * kChunk / 2 + kPrefetch, 0, 2);
    add(chunk, kChunk / 2);
  }
  if (left) add(whole, left);
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) y[c * pitch + r] += sum(total[c][r]);
}

template <typename Rows, typename T>
void product(const Rows& x, const Weight& weight, const Weight& up, const Epilogue<T>& write, int64_t rows,
             int64_t inner, int64_t group, int64_t threads) {
  const int64_t count = inner / group, own = 8 * x.groups.padded(), block = kOutputBlock * rows;
  const auto body = [&](int64_t n, int64_t outputs, float* scratch) {
    float *y = scratch + own, *raised = y + block;
    std::memset(scratch, 0, own * sizeof(float));
    const auto multiply = [&](const Weight& by, float* to) {
      for_tiles(outputs, rows, x.row_bytes(), [&](auto width, auto height, int64_t i, int64_t row) {
        constexpr int C = decltype(width)::value, R = decltype(height)::value;
        const auto run = group >= kChunk ? dot<true, C, R, Rows> : dot<false, C, R, Rows>;
        run(by, n + i, x, row, count, group, scratch, to + i * rows + row, rows);
      });
    };
    multiply(weight, y);
    if (up.codes) multiply(up, raised);
    write(n, outputs, rows, y, up.codes ? raised : nullptr);
  };
  for_outputs(write.columns, rows * write.columns * inner, own + 2 * block, threads, body);
}

float number(const void* values, int64_t at, int64_t kind) {
  float x = 0;
  with_dtype(kind, [&](auto zero) { x = to_float(((const decltype(zero)*)values)[at]); });
  return x;
}

#if defined(__AVX512BF16__)
// Rows of bfloat16 against the weights rounded to bfloat16.
void product_in_panels(const bfloat16* x, const Weight& weight, const Epilogue<bfloat16>& write, int64_t rows,
                      int64_t inner, int64_t group, int64_t threads) {
  const int64_t groups = inner / group;
  const auto weights = [&](int64_t n, int64_t step, int64_t count, uint8_t* panel) {
    for (int64_t i = 0; i < 32; ++i) {
      float scale = 0, zero_point = 8;
      for (int64_t s = 0; s < count; ++s) {
        const int64_t k = (step + s) * 32, at = (n + i) * groups + k / group;
        if (s == 0 || k % group == 0) {
          scale = number(weight.scales, at, weight.kind);
          if (weight.zeros) zero_point = number(weight.zeros, at, weight.kind);
        }
        const __m128i bytes = _mm_loadu_si128((const __m128i*)(weight.codes + ((n + i) * inner + k) / 2));
        const IntVec pairs = (IntVec)_mm512_cvtepu8_epi32(bytes);
        store_pairs(panel + (s * 32 + i) * 64, (to_float(pairs & 15) - zero_point) * scale,
                    (to_float(pairs >> 4) - zero_point) * scale);
      }
    }
  };
  for_panels<false>(x, rows, inner, write.columns, threads, {weight.codes, inner / 2, 16}, weights, write.out, sizeof(bfloat16),
                    write);
}
#endif

}  // namespace
}  // namespace afnext

// x: [rows, inner] of dtype; weight, up: [columns, inner / 2], the even input in a byte's low four bits; scales, zeros:
// [columns, inner / group] of group_dtype, group 32, 64 or 128, zeros null for 8; up: of a SwiGLU pair, or null; bias:
// [columns] float32 or null; residual, null or, and out: [rows, columns] of dtype.
AFNEXT_EXPORT void afnext_linear_int4(const void* x, const uint8_t* weight, const void* scales, const void* zeros,
                                      const uint8_t* up, const void* up_scales, const void* up_zeros, const float* bias,
                                      const void* residual, void* out, int64_t rows, int64_t columns, int64_t inner,
                                      int64_t group, int64_t group_dtype, int64_t dtype, int64_t threads) {
  using namespace afnext;
  const Weight first{weight, scales, zeros, group_dtype}, second{up, up_scales, up_zeros, group_dtype};
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Epilogue<T> write{bias, (const T*)residual, (T*)out, columns};
#if defined(__AVX512BF16__)
    if constexpr (std::is_same<T, bfloat16>::value)
      if (!up && takes_panels(rows, columns))
        return product_in_panels((const T*)x, first, write, rows, inner, group, threads);
#endif
#if defined(__AVX2__)
    using Rows = std::conditional_t<std::is_same<T, bfloat16>::value, FixedRows, FloatRows>;
#else
    using Rows = FloatRows;
#endif
    product(Rows((const T*)x, rows, inner, group), first, second, write, rows, inner, group, threads);
  });
}

// The weights as numbers, [columns, inner] of dtype: scales * (codes - zeros), rounded once.
AFNEXT_EXPORT void afnext_unpack_int4(const uint8_t* weight, const void* scales, const void* zeros, void* out,
                                      int64_t columns, int64_t inner, int64_t group, int64_t group_dtype, int64_t dtype,
                                      int64_t threads) {
  using namespace afnext;
  const int64_t groups = inner / group;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_outputs(columns, columns * inner, 0, threads, [&](int64_t n, int64_t outputs, float*) {
      for (int64_t g = n * groups; g < (n + outputs) * groups; ++g) {
        const float scale = number(scales, g, group_dtype), zero_point = zeros ? number(zeros, g, group_dtype) : 8;
        T* to = (T*)out + g * group;
        const uint8_t* from = weight + g * group / 2;
        float wide[128];
        for (int i = 0; i < group / 2; ++i) {
          wide[2 * i] = scale * ((from[i] & 15) - zero_point);
          wide[2 * i + 1] = scale * ((from[i] >> 4) - zero_point);
        }
        for (int i = 0; i < group; i += kLanes) store(to + i, load(wide + i));
      }
    });
  });
}
