// CUDA emulation on the host, so that tests run the kernels of cuda.cu on a CPU, under AddressSanitizer. One fiber per
// CUDA thread; blocks run one after the other. Barriers and shuffles are real: a fiber waits for the others. These
// abort the process with a message: a barrier that only a part of the block reaches, a shuffle that lanes of its mask
// miss, a misaligned vector access, a trap, an invalid launch. Not detected: races between blocks or between warps (the
// order of fibers is shuffled, see emulate_seed), and performance.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)

#define threadIdx (emulate::running().thread)
#define blockIdx (emulate::running().block)
#define blockDim (emulate::running().block_size)
#define gridDim (emulate::running().grid_size)

using dim3 = emulate::Dim3;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define SHARE4V_DYNAMIC_SHARED(name) float* const name = reinterpret_cast<float*>(emulate::running().shared)
#define SHARE4V_CHECK_ALIGNED(pointer, bytes) \
  do { \
    if (reinterpret_cast<uintptr_t>(pointer) % (bytes)) emulate::fail("misaligned vector access", __LINE__); \
  } while (0)

inline void __syncthreads(int line = __builtin_LINE()) { emulate::wait_for_block(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { emulate::exchange(mask, 0, line); }

template <class T>
T shuffle_from(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "as in CUDA: 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* lanes = emulate::exchange(mask, bits, line);
  std::memcpy(&value, lanes + source, sizeof(T));
  return value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return shuffle_from(mask, value, source & 31, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int line = __builtin_LINE()) {
  return shuffle_from(mask, value, emulate::lane() ^ flip, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int line = __builtin_LINE()) {
  const int source = emulate::lane() + static_cast<int>(by);
  return shuffle_from(mask, value, source < 32 ? source : emulate::lane(), line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const uint64_t* lanes = emulate::exchange(mask, predicate ? 1 : 0, line);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (mask >> i & 1u) && lanes[i] ? 1u << i : 0u;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}

// Fibers switch only at barriers and shuffles, so plain arithmetic is atomic.
template <class T>
T atomicAdd(T* to, T value) {
  const T old = *to;
  *to = old + value;
  return old;
}
template <class T>
T atomicMax(T* to, T value) {
  const T old = *to;
  if (value > old) *to = value;
  return old;
}
inline void __threadfence() {}
inline void __trap(int line = __builtin_LINE()) { emulate::fail("trap", line); }

template <class T>
T __ldg(const T* from) {
  return *from;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

using cudaStream_t = void*;
inline int cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return 0;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void*, Arguments... arguments) {
  emulate::run(grid, block, shared, [=] { kernel(static_cast<Parameters>(arguments)...); });
  return 0;
}
