// Helpers of cuda.cu files: launch, 16-byte accesses, sums over a warp and a block. The same source compiles under nvcc
// and, through emulate/cuda.h, under g++.
#pragma once

#include "types.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream, Arguments... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

// Declares `float* name`, the block's dynamic shared memory, 16-byte aligned. One per kernel.
#define SHARE4V_DYNAMIC_SHARED(name) \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  float* const name = reinterpret_cast<float*>(name##_raw)

#define SHARE4V_CHECK_ALIGNED(pointer, bytes)
#else
#include "../emulate/cuda.h"
#endif

constexpr int kWarp = 32;
// Dynamic shared memory per block that every supported GPU has (sm_80: 163 KB).
constexpr size_t kSharedLimit = 160 * 1024;

// N consecutive elements, loaded or stored in one access; N * sizeof(T) is at most 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <class T>
constexpr int vector_length() {
  return static_cast<int>(16 / sizeof(T));
}

template <class T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  SHARE4V_CHECK_ALIGNED(from, sizeof(T) * N);
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& value) {
  SHARE4V_CHECK_ALIGNED(to, sizeof(T) * N);
  *reinterpret_cast<Vector<T, N>*>(to) = value;
}

// Whether rows of `width` elements that start at these pointers allow 16-byte accesses. Null pointers are ignored.
template <class T, class... Pointers>
bool can_vectorize(int64_t width, const Pointers*... pointers) {
  return width % vector_length<T>() == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls `body` with the vector length as a constant: 16 bytes if `vectors`, else one element.
template <class T, class Body>
int with_vector(bool vectors, Body body) {
  if (vectors) return body(std::integral_constant<int, vector_length<T>()>{});
  return body(std::integral_constant<int, 1>{});
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sums N values over the block, in every thread. All threads of the block must call; blockDim.x is a multiple of 32, at
// most 1024.
template <int N>
__device__ __forceinline__ void block_sum(float (&values)[N]) {
  __shared__ float partial[N][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = warp_sum(values[i]);
    if (lane == 0) partial[i][warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = warp_sum(lane < warps ? partial[i][lane] : 0.0f);
  // The next call overwrites `partial`.
  __syncthreads();
}

// Number of threads for a row of `vectors` accesses: a power of two from 32 to `most`.
inline int threads_for(int64_t vectors, int most) {
  int threads = kWarp;
  while (threads < most && threads < vectors) threads *= 2;
  return threads;
}
