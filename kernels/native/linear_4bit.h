// Products of few rows with 4-bit weights in groups of neighbouring inputs, read once from memory. A Packing says how
// codes are stored: `Nibbles` or the denser `EvenNibbles` (even_nibbles.h).
//
//     y[c, r] = sum_k x[r, k] * scales[c, g] * (number[c, k] - (zeros[c, g] - offset))
//
// A lane holds the eight codes of a four-byte word, which belong to one group. Sums use the numbers that the codes
// represent. At the end, (zeros - offset) times the sum of the group's activations is subtracted.

#pragma once

#include "panels.h"

namespace afnext {

constexpr int kChunk = 8 * kLanes;  // inputs of a vector of words

inline BitVec load_words(const uint8_t* p, int64_t left) {
  BitVec words{};
  std::memcpy(&words, p, left < (int64_t)sizeof words ? left : sizeof words);
  return words;
}

// Codes as they are stored: two per byte.
struct Nibbles {
  static constexpr int kVectors = 1;             // of words in a block
  static constexpr int kBytes = sizeof(BitVec);  // stored for a block
  static constexpr int64_t stored(int64_t inputs) { return inputs / 2; }

  // The words of a block, of which `left` bytes are stored.
  static void load_block(const uint8_t* p, int64_t left, BitVec (&words)[kVectors]) { words[0] = load_words(p, left); }

  // Two codes per byte from input `first` of the matrix on.
  static const uint8_t* codes(const uint8_t* stored, int64_t first, int64_t, uint8_t*) { return stored + first / 2; }
};

// Gives each lane the value of its codes' group, from the values of neighbouring groups.
template <bool ONE_GROUP>
class Spread {
 public:
  // lanes: per group, a power of two of at least 4; at least kLanes if ONE_GROUP.
  explicit Spread(int64_t lanes) : shift_(lanes == 4 ? 2 : lanes == 8 ? 3 : 4) {
    for (int i = 0; i < kLanes; ++i) source_[i] = i >> shift_;
  }

  // values: of all groups, kLanes readable from each.
  Vec operator()(const float* values, int64_t chunk) const {
    const float* first = values + (kLanes == 16 && ONE_GROUP ? chunk : chunk * kLanes >> shift_);
#if defined(__AVX512F__)
    if constexpr (!ONE_GROUP) {
      const __m512 groups = _mm512_broadcast_f32x4(_mm_loadu_ps(first));
      return (Vec)_mm512_permutevar_ps(groups, (__m512i)source_);
    }
#elif defined(__AVX2__)
    if constexpr (!ONE_GROUP) return (Vec)_mm256_permutevar8x32_ps((__m256)load(first), (__m256i)source_);
#endif
    return splat(*first);
  }

 private:
  int shift_;
  IntVec source_;
};

// For each row and group, the scale and the sum of its activations; padded with zeros to whole vectors.
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

// Bits below the code of the t-th input in a word; even inputs have `even` bits below them in their byte.
constexpr int shift_of(int t, int even) { return 8 * (t / 2) + (t % 2 ? 4 - even : even); }

// Activations as float32: word w of a chunk holds the inputs 8 w .. 8 w + 7, the t-th of which is in vector t.
// Codes::number(codes): the numbers for the lowest four bits of each lane, before zeros and scales; Codes::kEven: bits
// below the code of a byte's even input.
template <typename Codes>
class FloatRows {
 public:
  static constexpr int kOffset = Codes::kOffset;

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
  int64_t pitch() const { return pitch_; }

  // sums[c][r] = codes * x in each lane, for the words of C outputs and a chunk of R rows `pitch` apart.
  template <int C, int R>
  static AFNEXT_ALWAYS_INLINE void dot(const BitVec* words, const float* x, int64_t pitch, Vec (*sums)[R]) {
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) sums[c][r] = Vec{};
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t)
      for (int c = 0; c < C; ++c) {
        const Vec numbers = Codes::number(words[c] >> shift_of(t, Codes::kEven));
        for (int r = 0; r < R; ++r) sums[c][r] += numbers * load(x + r * pitch + t * kLanes);
      }
  }

  Groups groups;

 private:
  int64_t pitch_;
  Scratch<float> values_;
};

// Scales and zeros are of the dtype `kind`.
struct Weight {
  const uint8_t* codes;  // or null
  const void* scales;
  const void* zeros;  // or null for 8
  int64_t kind;
};

// products[g] = scale * scale of the row's activations, for all groups of an output. Returns, in parts, the amount that
// the zeros subtract from the sum: sum_g scale * (zero - offset) * sum of the row's activations.
template <typename S>
Vec weigh_groups(const S* scales, const S* zeros, int64_t count, float offset, const float* row_scales,
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
  return shift;
}

// y[c, r] for C outputs from n on and R rows from `row` on, y `pitch` apart; products: [C * R, padded] floats, finite.
template <typename Packing, bool ONE_GROUP, int C, int R, typename Rows>
void dot(const Weight& weight, int64_t n, const Rows& x, int64_t row, int64_t count, int64_t group, float* products,
         float* y, int64_t pitch) {
  const Spread<ONE_GROUP> spread(group / 8);
  const int64_t padded = x.groups.padded(), stored = Packing::stored(count * group);
  Vec total[C][R];
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r)
      with_dtype(weight.kind, [&](auto zero) {
        using S = const decltype(zero);
        const int64_t first = (n + c) * count;
        total[c][r] = -weigh_groups((S*)weight.scales + first, weight.zeros ? (S*)weight.zeros + first : nullptr, count,
                                    Rows::kOffset, x.groups.scales(row + r), x.groups.sums(row + r),
                                    products + (c * R + r) * padded);
      });
  const uint8_t* codes = weight.codes + n * stored;
  const auto* activations = x.row(row);
  const int64_t pitch_x = x.pitch();
  const auto add = [&](int64_t block, int64_t left) AFNEXT_ALWAYS_INLINE {
    BitVec words[C][Packing::kVectors];
    for (int c = 0; c < C; ++c) Packing::load_block(codes + c * stored + block * Packing::kBytes, left, words[c]);
#pragma GCC unroll 4
    for (int v = 0; v < Packing::kVectors; ++v) {
      const int64_t chunk = block * Packing::kVectors + v;
      BitVec of[C];
      for (int c = 0; c < C; ++c) of[c] = words[c][v];
      Vec sums[C][R];
      Rows::template dot<C, R>(of, activations + chunk * Rows::kStep, pitch_x, sums);
      for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) total[c][r] += sums[c][r] * spread(products + (c * R + r) * padded, chunk);
    }
  };
  const int64_t whole = stored / Packing::kBytes, left = stored - whole * Packing::kBytes;
  Ahead<C> ahead(codes, C * stored);
  for (int64_t block = 0; block < whole; ++block) {
    ahead.read(C * Packing::kBytes);
    add(block, Packing::kBytes);
  }
  if (left) add(whole, left);
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) y[c * pitch + r] = sum(total[c][r]);
}

template <typename Packing, typename Rows, typename T>
void product(const Rows& x, const Weight& weight, const Weight& up, const Epilogue<T>& write, int64_t rows,
             int64_t inner, int64_t group, int64_t threads) {
  const int64_t count = inner / group, own = 8 * x.groups.padded(), block = kOutputBlock * rows;
  const int64_t row_bytes = x.pitch() * sizeof *x.row(0);
  const auto body = [&](int64_t n, int64_t outputs, float* scratch) {
    float *y = scratch + own, *raised = y + block;
    const auto multiply = [&](const Weight& by, float* to) {
      for_tiles(outputs, rows, row_bytes, [&](auto width, auto height, int64_t i, int64_t row) {
        constexpr int C = decltype(width)::value, R = decltype(height)::value;
        const auto run = group >= kChunk ? dot<Packing, true, C, R, Rows> : dot<Packing, false, C, R, Rows>;
        run(by, n + i, x, row, count, group, scratch, to + i * rows + row, rows);
      });
    };
    multiply(weight, y);
    if (up.codes) multiply(up, raised);
    write(n, outputs, rows, y, up.codes ? raised : nullptr);
  };
  for_outputs(write.columns, rows * write.columns * inner, own + 2 * block, threads, body);
}

#if defined(AFNEXT_PANELS)
// For the codes of a stretch, two per byte, and of the blocks of 128 inputs that it begins and ends in.
constexpr int64_t kStretchBytes = 16 * 64 / 2 + 128;

// A matrix for products with floats: rounded to bfloat16 at levels with bfloat16 dot products.
template <typename Packing, typename Codes, typename GroupOf>
struct UnpackedMatrix {
  const Weight& weight;
  GroupOf group_of;
  int64_t inner, group;

  Rows source() const { return {weight.codes, Packing::stored(inner), Packing::stored(kNumbers)}; }

  void write(int64_t n, int64_t outputs, int64_t step, int64_t count, uint8_t* panel, int64_t at) const {
    for (int64_t i = 0; i < outputs; ++i) {
      const int64_t first = (n + i) * (inner / group);
      auto numbers = group_of(weight, first + step * kNumbers / group);
      const int64_t start = step * kNumbers, inputs = std::min(count * kNumbers, inner - start);
      alignas(64) uint8_t space[kStretchBytes];
      const uint8_t* codes = Packing::codes(weight.codes, (n + i) * inner + start, inputs, space);
      for (int64_t s = 0; s < count; ++s) {
        const int64_t k = (step + s) * kNumbers;
        if (k % group == 0) numbers = group_of(weight, first + k / group);
        write_step(codes + s * kNumbers / 2, numbers, panel + (s * 32 + at + i) * 64);
      }
    }
  }

 private:
  template <typename Numbers>
  static void write_step(const uint8_t* codes, const Numbers& numbers, uint8_t* to) {
    constexpr int kEven = shift_of(0, Codes::kEven), kOdd = shift_of(1, Codes::kEven);
#if defined(AFNEXT_BFLOAT16)
    for (int i = 0; i < kNumbers / 2; i += kLanes) {
      const BitVec pairs = widen(load_as<UByteVec>(codes + i));
      store_pairs((bfloat16*)to + 2 * i, numbers(pairs >> kEven), numbers(pairs >> kOdd));
    }
#else
    BitVec shifts;
    for (int i = 0; i < kLanes; ++i) shifts[i] = i % 2 ? kOdd : kEven;
    for (int i = 0; i < kNumbers; i += kLanes) store((float*)to + i, numbers(twice(codes + i / 2) >> shifts));
#endif
  }
};
#endif

// Rows: activations for few rows; up: second weight of a SwiGLU pair, or nulls. group_of(weight, index), for output and
// group: a function from codes in the lowest four bits of each lane to weights, with `one` for a single code.
template <typename Packing, typename Codes, typename Rows, typename T, typename GroupOf>
void multiply_4bit(const T* x, const Weight& weight, const Weight& up, GroupOf group_of, const Epilogue<T>& write,
                   int64_t rows, int64_t inner, int64_t group, int64_t threads) {
#if defined(AFNEXT_PANELS)
  if constexpr (kPanelsTake<T>)
    if (takes_panels(rows, write.columns)) {
      const UnpackedMatrix<Packing, Codes, GroupOf> matrices[2] = {{weight, group_of, inner, group},
                                                                   {up, group_of, inner, group}};
      return for_panels(x, rows, inner, threads, matrices, Outputs(write), write);
    }
#endif
  product<Packing>(Rows(x, rows, inner, group), weight, up, write, rows, inner, group, threads);
}

// Dequantizes the weights, [columns, inner], rounded once; group_of: see above.
template <typename Packing, typename Codes, typename T, typename GroupOf>
void unpack_4bit(const Weight& weight, GroupOf group_of, T* out, int64_t columns, int64_t inner, int64_t group,
                 int64_t threads) {
  const int64_t groups = inner / group;
  for_outputs(columns, columns * inner, 0, threads, [&](int64_t n, int64_t outputs, float*) {
    for (int64_t g = n * groups; g < (n + outputs) * groups; ++g) {
      const auto numbers = group_of(weight, g);
      float wide[128];
      alignas(64) uint8_t space[128 / 2];
      const uint8_t* from = Packing::codes(weight.codes, g * group, group, space);
      for (int64_t i = 0; i < group / 2; ++i) {
        wide[2 * i] = numbers.one(from[i] >> shift_of(0, Codes::kEven) & 15);
        wide[2 * i + 1] = numbers.one(from[i] >> shift_of(1, Codes::kEven) & 15);
      }
      for (int64_t i = 0; i < group; i += kLanes) store(out + g * group + i, load(wide + i));
    }
  });
}

}  // namespace afnext
