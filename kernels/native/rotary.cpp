// Rotation of queries and keys, and the write into the pages of the KV cache: see rotary.py and kv_write.py.

#include <algorithm>
#include <cmath>

#include "float8.h"
#include "rows.h"

namespace afnext {
namespace {

constexpr int kMaxHeadDim = 512;  // of a row, which is kept on the stack

struct Rows {
  const void* data;
  int64_t batch, time, head;  // strides
};

struct Turns {
  const float *cos, *sin;  // [batch * time, pairs]
  int64_t pairs;
  bool half;
};

// Row `head` of token `t` of sequence `b` as float32, rotated unless `turns` is null.
template <typename T>
void load_row(const Rows& rows, int64_t b, int64_t t, int64_t time, int64_t head, int64_t head_dim, const Turns* turns,
              float* row) {
  convert((const T*)rows.data + b * rows.batch + t * rows.time + head * rows.head, head_dim, 1.0f, row);
  if (!turns) return;
  const int64_t at = (b * time + t) * turns->pairs;
  rotate(row, turns->cos + at, turns->sin + at, turns->pairs, turns->half);
}

// The scale is the largest magnitude / the largest code; each element is divided by it and rounded half to even. Both
// are IEEE divisions, so that every implementation stores the same codes.
void quantize(const float* row, int64_t head_dim, bool e4m3, uint8_t* codes, float* scale) {
  float most = 0;
  for (int64_t d = 0; d < head_dim; ++d) most = std::max(most, std::fabs(row[d]));
  const float largest = e4m3 ? 448.0f : 127.0f;
  *scale = most / largest;
  const float divisor = *scale > 0 ? *scale : 1.0f;
  const auto put = [&](auto code) {
    for (int64_t d = 0; d < head_dim; ++d) codes[d] = code(std::max(-largest, std::min(largest, row[d] / divisor)));
  };
  if (e4m3) {
    put(float8_bits);
  } else {
    put([](float x) { return (uint8_t)(int8_t)((x + 12582912.0f) - 12582912.0f); });  // 1.5 * 2^23 leaves no fraction
  }
}

}  // namespace
}  // namespace afnext

// x: [batch, time, heads, head_dim] by its strides; out: likewise, contiguous; both of `dtype`.
AFNEXT_EXPORT void afnext_rotary(const void* x, void* out, const float* cos, const float* sin, int64_t batch,
                                 int64_t time, int64_t heads, int64_t head_dim, int64_t pairs, int64_t half,
                                 int64_t x_batch, int64_t x_time, int64_t x_head, int64_t dtype, int64_t threads) {
  using namespace afnext;
  const Rows rows{x, x_batch, x_time, x_head};
  const Turns turns{cos, sin, pairs, half != 0};
#pragma omp parallel for num_threads(threads) if (batch * time * heads * head_dim > 32768)
  for (int64_t token = 0; token < batch * time; ++token) {
    for (int64_t head = 0; head < heads; ++head) {
      with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        float row[kMaxHeadDim];
        load_row<T>(rows, token / time, token % time, time, head, head_dim, &turns, row);
        convert(row, head_dim, 1.0f, (T*)out + (token * heads + head) * head_dim);
      });
    }
  }
}

// k, v: [batch, time, kv_heads, head_dim] of `dtype`; caches: [slot, kv_heads, head_dim] of `cache_dtype`, or int8 or
// e4m3 with their scales, [slot, kv_heads]; slots: [batch, time].
AFNEXT_EXPORT void afnext_kv_write(const void* k, const void* v, void* k_cache, void* v_cache, float* k_scales,
                                   float* v_scales, const int64_t* slots, const float* cos, const float* sin,
                                   int64_t batch, int64_t time, int64_t kv_heads, int64_t head_dim, int64_t pairs,
                                   int64_t half, int64_t k_batch, int64_t k_time, int64_t k_head, int64_t v_batch,
                                   int64_t v_time, int64_t v_head, int64_t dtype, int64_t cache_dtype, int64_t e4m3,
                                   int64_t threads) {
  using namespace afnext;
  const Rows keys{k, k_batch, k_time, k_head}, values{v, v_batch, v_time, v_head};
  const Turns turns{cos, sin, pairs, half != 0};
#pragma omp parallel for num_threads(threads) if (batch * time * kv_heads * head_dim > 16384)
  for (int64_t token = 0; token < batch * time; ++token) {
    for (int64_t i = 0; i < 2 * kv_heads; ++i) {
      const bool key = i < kv_heads;
      const int64_t head = key ? i : i - kv_heads, at = slots[token] * kv_heads + head;
      float row[kMaxHeadDim];
      with_dtype(dtype, [&](auto zero) {
        load_row<decltype(zero)>(key ? keys : values, token / time, token % time, time, head, head_dim,
                                 key ? &turns : nullptr, row);
      });
      void* cache = key ? k_cache : v_cache;
      float* scales = key ? k_scales : v_scales;
      if (scales) {
        quantize(row, head_dim, e4m3, (uint8_t*)cache + at * head_dim, scales + at);
      } else {
        with_dtype(cache_dtype,
                   [&](auto zero) { convert(row, head_dim, 1.0f, (decltype(zero)*)cache + at * head_dim); });
      }
    }
  }
}
