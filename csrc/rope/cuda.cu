// CUDA rotary positions: one block per token; a thread keeps the cosines and sines of its columns and loops over heads.
#include "../common/device.cuh"

namespace {

constexpr int kThreads = 256;

// Loads N fp32 values in 16-byte accesses where possible.
template <int N>
__device__ __forceinline__ void load_floats(float (&to)[N], const float* from) {
  constexpr int kStep = N < 4 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    const Vector<float, kStep> part = load<float, kStep>(from + i);
#pragma unroll
    for (int k = 0; k < kStep; ++k) to[i + k] = part.at[k];
  }
}

// Block shape (columns / V, heads at once). V divides half of a head.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    rotate(const T* __restrict__ query, const T* __restrict__ key, const float* __restrict__ table,
           const int64_t* __restrict__ positions, T* __restrict__ rotated_query, T* __restrict__ rotated_key,
           int64_t batch, int heads, int groups, int half, int64_t query_stride, int64_t key_stride, int64_t places,
           float sign) {
  const int64_t token = blockIdx.x, place = positions ? positions[token] : token / batch;
  if (place < 0 || place >= places) __trap();
  const int width = 2 * half;
  for (int column = threadIdx.x * V; column < half; column += blockDim.x * V) {
    float cosines[V], sines[V];
    load_floats(cosines, table + place * width + column);
    load_floats(sines, table + place * width + half + column);
    for (int head = threadIdx.y; head < heads + groups; head += blockDim.y) {
      const bool of_query = head < heads;
      const int own = of_query ? head : head - heads;
      const T* const from = (of_query ? query + token * query_stride : key + token * key_stride) + own * width + column;
      T* const to = (of_query ? rotated_query + token * heads * width : rotated_key + token * groups * width) +
                    own * width + column;
      const Vector<T, V> first = load<T, V>(from), second = load<T, V>(from + half);
      Vector<T, V> left, right;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float a = to_float(first.at[k]), b = to_float(second.at[k]), sine = sign * sines[k];
        left.at[k] = from_float<T>(a * cosines[k] - b * sine);
        right.at[k] = from_float<T>(b * cosines[k] + a * sine);
      }
      store<T, V>(to, left);
      store<T, V>(to + half, right);
    }
  }
}

}  // namespace

extern "C" int share4v_rope_cuda(int type, const void* query, const void* key, const float* table,
                                 const int64_t* positions, void* rotated_query, void* rotated_key, int64_t tokens,
                                 int64_t batch, int64_t heads, int64_t groups, int64_t width, int64_t query_stride,
                                 int64_t key_stride, int64_t places, bool inverse, void* stream) {
  if (tokens == 0 || heads + groups == 0) return kDone;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t half = width / 2;
    const bool vectors = can_vectorize<T>(half, query, key, table, rotated_query, rotated_key) &&
                         query_stride % vector_length<T>() == 0 && key_stride % vector_length<T>() == 0;
    return with_vector<T>(vectors, [&](auto length) {
      constexpr int V = decltype(length)::value;
      const unsigned across = static_cast<unsigned>(half / V < kThreads ? half / V : kThreads);
      return launch(rotate<T, V>, dim3(static_cast<unsigned>(tokens)), dim3(across, kThreads / across), 0, stream,
                    static_cast<const T*>(query), static_cast<const T*>(key), table, positions,
                    static_cast<T*>(rotated_query), static_cast<T*>(rotated_key), batch, static_cast<int>(heads),
                    static_cast<int>(groups), static_cast<int>(half), query_stride, key_stride, places,
                    inverse ? -1.0f : 1.0f);
    });
  });
}
