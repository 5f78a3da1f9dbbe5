// Average pooling by two, LayerNorm and the rotary time embedding: see rote.py.

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "rows.h"

namespace afnext {
namespace {

inline Vec choose(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }

// Sine and cosine of angles up to 1e5 rad, each to about one unit in the last place: subtracts a multiple of pi / 2,
// which is split into 8-bit parts so that products with the multiple are exact, then evaluates polynomials (Cephes).
inline void sine_cosine(Vec angle, Vec& sine, Vec& cosine) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (angle * 0.6366197723675814f + shift) - shift;
  Vec r = angle - n * 1.5703125f;
  r -= n * 4.825592041015625e-4f;
  r -= n * 1.2665987014770508e-6f;
  r -= n * 9.920935796805404e-10f;
  const Vec z = r * r;
  const Vec s = r + r * z * (z * (8.3321608736e-3f - z * 1.9515295891e-4f) - 1.6666654611e-1f);
  const Vec c =
      1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (z * 2.443315711809948e-5f - 1.388731625493765e-3f));
  const IntVec quadrant = __builtin_convertvector(n, IntVec);
  const IntVec swapped = (quadrant & 1) != 0;
  const Vec first = choose(swapped, c, s), second = choose(swapped, s, c);
  sine = choose((quadrant & 2) != 0, -first, first);
  cosine = choose(((quadrant + 1) & 2) != 0, -second, second);
}

// The sum of term(i) over the vectors of a row, in float32 within blocks and double across them.
template <typename Term>
double sum_vectors(int64_t whole, Term term) {
  constexpr int64_t kBlock = 64 * kLanes;
  double total = 0;
  for (int64_t first = 0; first < whole; first += kBlock) {
    Vec partial{};
    for (int64_t i = first; i < std::min(first + kBlock, whole); i += kLanes) partial += term(i);
    total += sum(partial);
  }
  return total;
}

// row: `padded` floats, a multiple of kLanes, of which the first `channels` are used.
template <typename T>
void pool_and_norm(const T* first, const T* second, const T* weight, const T* bias, int64_t channels, int64_t padded,
                   float eps, float* row) {
  const auto each = [&](auto&& function) {
    int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) function(i, [i](const T* p) { return load(p + i); });
    if (i < channels) function(i, [&](const T* p) { return load_first(p + i, channels - i); });
  };
  each([&](int64_t i, auto get) { store(row + i, 0.5f * (get(first) + get(second))); });
  const float mean = sum_vectors(padded, [&](int64_t i) { return load(row + i); }) / channels;
  each([&](int64_t i, auto get) { store(row + i, load(row + i) - mean); });
  for (int64_t i = channels; i < padded; ++i) row[i] = 0;
  const double squares = sum_vectors(padded, [&](int64_t i) { return load(row + i) * load(row + i); });
  const float factor = 1 / std::sqrt(squares / channels + eps);
  each([&](int64_t i, auto get) { store(row + i, load(row + i) * factor * get(weight) + get(bias)); });
}

void turn(float* row, const float* angles, int64_t pairs) {
  for (int64_t pair = 0; pair < pairs; pair += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, pairs - pair);
    Vec sine, cosine;
    sine_cosine(count == kLanes ? load(angles + pair) : load_first(angles + pair, count), sine, cosine);
    float sin[kLanes], cos[kLanes];
    store(sin, sine);
    store(cos, cosine);
    for (int64_t j = 0; j < count; ++j) {
      float* x = row + 2 * (pair + j);
      const float a = x[0], b = x[1];
      x[0] = a * cos[j] - b * sin[j];
      x[1] = b * cos[j] + a * sin[j];
    }
  }
}

}  // namespace
}  // namespace afnext

// x: [batch, at least 2 * length, channels] by its strides; weight, bias: [channels]; out: [batch, length, channels],
// contiguous; all of `dtype`. angles: [.., pairs] by its strides, or null; windows: [batch], the entry of `angles` of each
// row, or null for its own. workspace: [threads, workspace_row] float32, for each thread channels and 16 more.
AFNEXT_EXPORT void afnext_pool_norm_rotate(const void* x, const void* weight, const void* bias, const float* angles,
                                           const int64_t* windows, void* out, float* workspace, int64_t workspace_row,
                                           int64_t batch, int64_t length, int64_t channels, int64_t x_window,
                                           int64_t x_position, int64_t angles_window, int64_t angles_token,
                                           int64_t pairs, double eps, int64_t dtype, int64_t threads) {
  using namespace afnext;
  const int64_t padded = (channels + kLanes - 1) / kLanes * kLanes;
#pragma omp parallel num_threads(threads) if (batch * length * channels > 32768)
  {
    float* row = workspace + omp_get_thread_num() * workspace_row;
#pragma omp for
    for (int64_t i = 0; i < batch * length; ++i) {
      const int64_t b = i / length, token = i % length;
      with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* first = (const T*)x + b * x_window + 2 * token * x_position;
        pool_and_norm(first, first + x_position, (const T*)weight, (const T*)bias, channels, padded, (float)eps, row);
        if (angles) turn(row, angles + (windows ? windows[b] : b) * angles_window + token * angles_token, pairs);
        convert(row, channels, 1.0f, (T*)out + i * channels);
      });
    }
  }
}
