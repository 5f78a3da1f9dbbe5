// Functions of each element by itself, over memory.

#pragma once

#include "vec.h"

namespace afnext {

// 2 * kLanes neighbours in an order that load_two and store_two share: of bfloat16 the even ones and the odd ones, which
// takes two operations on whole registers, where widening each half takes shuffles and thrice the time.
struct TwoVecs {
  Vec first, second;
};

template <typename T>
inline TwoVecs load_two(const T* p) {
  return {load(p), load(p + kLanes)};
}

inline TwoVecs load_two(const bfloat16* p) {
  BitVec bits;
  std::memcpy(&bits, p, sizeof bits);
  return {(Vec)(bits << 16), (Vec)(bits & 0xFFFF0000)};
}

template <typename T>
inline void store_two(T* p, TwoVecs x) {
  store(p, x.first);
  store(p + kLanes, x.second);
}

inline void store_two(bfloat16* p, TwoVecs x) {
  const BitVec bits = rounded_to_bfloat16(x.first) >> 16 | (rounded_to_bfloat16(x.second) & 0xFFFF0000);
  std::memcpy(p, &bits, sizeof bits);
}

// out[i] = function(x[i], ...) for i < count.
template <typename T, typename Function, typename... Input>
inline void map(T* out, int64_t count, Function function, const Input*... x) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    store_two(out + i, {function(load_two(x + i).first...), function(load_two(x + i).second...)});
  for (; i + kLanes <= count; i += kLanes) store(out + i, function(load(x + i)...));
  if (i < count) store_first(out + i, function(load_first(x + i, (int)(count - i))...), (int)(count - i));
}

}  // namespace afnext
