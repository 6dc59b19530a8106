// CPU rotary positions: a token's cosines and sines are read from the L1 cache for all its heads.
#include "../common/host.h"

namespace {

// Elements i and i + half of each head are a point in a plane, rotated by angle i.
template <class T>
SHARE4V_CLONES void rotate_heads(const T* from, T* to, const float* cosines, const float* sines, float sign,
                                 int64_t heads, int64_t half) {
  for (int64_t head = 0; head < heads; ++head) {
    const T* in = from + head * 2 * half;
    T* out = to + head * 2 * half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float first = to_float(in[i]), second = to_float(in[half + i]), cosine = cosines[i], sine = sign * sines[i];
      out[i] = from_float<T>(first * cosine - second * sine);
      out[half + i] = from_float<T>(second * cosine + first * sine);
    }
  }
}

}  // namespace

extern "C" int share4v_rope_cpu(int type, const void* query, const void* key, const float* table,
                                const int64_t* positions, void* rotated_query, void* rotated_key, int64_t tokens,
                                int64_t batch, int64_t heads, int64_t groups, int64_t width, int64_t query_stride,
                                int64_t key_stride, int64_t places, bool inverse, void*) {
  for (int64_t token = 0; positions && token < tokens; ++token) {
    if (positions[token] < 0 || positions[token] >= places) return kIndexOutOfRange;
  }
  const float sign = inverse ? -1.0f : 1.0f;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    parallel_rows(tokens, (heads + groups) * width, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const float* cosines = table + (positions ? positions[token] : token / batch) * width;
        const float* sines = cosines + width / 2;
        rotate_heads(static_cast<const T*>(query) + token * query_stride,
                     static_cast<T*>(rotated_query) + token * heads * width, cosines, sines, sign, heads, width / 2);
        rotate_heads(static_cast<const T*>(key) + token * key_stride,
                     static_cast<T*>(rotated_key) + token * groups * width, cosines, sines, sign, groups, width / 2);
      }
    });
    return static_cast<int>(kDone);
  });
}
