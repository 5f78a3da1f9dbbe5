// The write into the pages of an int4 KV cache: see kv_write.py and int4_cache.py.

#include "int4_rows.h"
#include "rows.h"

// k, v: [batch, time, kv_heads, head_dim] of `dtype` by their strides; caches: [slot, kv_heads, head_dim / 2] with their
// scales, [slot, kv_heads]; k_bias: [kv_heads, head_dim] of `dtype`, subtracted from keys, or null; slots: [batch,
// time].
AFNEXT_EXPORT void afnext_kv_write_int4(const void* k, const void* v, uint8_t* k_cache, uint8_t* v_cache,
                                        float* k_scales, float* v_scales, const void* k_bias, const int64_t* slots,
                                        const float* cos, const float* sin, int64_t batch, int64_t time,
                                        int64_t kv_heads, int64_t head_dim, int64_t pairs, int64_t half,
                                        int64_t k_batch, int64_t k_time, int64_t k_head, int64_t v_batch,
                                        int64_t v_time, int64_t v_head, int64_t dtype, int64_t threads) {
  using namespace afnext;
#pragma omp parallel for num_threads(threads) if (batch * time * kv_heads * head_dim > 8192)
  for (int64_t token = 0; token < batch * time; ++token) {
    const int64_t b = token / time, t = token % time;
    for (int64_t head = 0; head < kv_heads; ++head) {
      const int64_t at = slots[token] * kv_heads + head;
      float row[kMaxHeadDim], bias[kMaxHeadDim];
      with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        convert((const T*)k + b * k_batch + t * k_time + head * k_head, head_dim, 1.0f, row);
        if (k_bias) convert((const T*)k_bias + head * head_dim, head_dim, 1.0f, bias);
      });
      for (int64_t d = 0; k_bias && d < head_dim; ++d) row[d] -= bias[d];
      rotate(row, cos + token * pairs, sin + token * pairs, pairs, half);
      quantize_int4(row, head_dim, (Int4Pair*)k_cache + at * (head_dim / 2), k_scales + at);
      with_dtype(dtype, [&](auto zero) {
        convert((const decltype(zero)*)v + b * v_batch + t * v_time + head * v_head, head_dim, 1.0f, row);
      });
      quantize_int4(row, head_dim, (Int4Pair*)v_cache + at * (head_dim / 2), v_scales + at);
    }
  }
}
