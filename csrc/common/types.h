// Element types, for every compiler of the kernels: nvcc, g++ for the CPU kernels, g++ for the emulated .cu files.
// Kernels include no torch header: they have a C ABI of raw pointers, and only schema.cpp files (through binding.h) use
// tensors.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define SHARE4V_INLINE __host__ __device__ __forceinline__
using bf16 = __nv_bfloat16;
#else
#define SHARE4V_INLINE inline __attribute__((always_inline))
struct bf16 {
  uint16_t bits;
};
#endif

// Element type, the first argument `type` of a kernel.
enum Type : int { kFloat32 = 0, kBFloat16 = 1 };

// Return value of a kernel; positive values are cudaError_t.
enum Status : int { kDone = 0, kUnknownType = -1, kIndexOutOfRange = -2, kTooWide = -3 };

SHARE4V_INLINE float to_float(float value) { return value; }

#ifdef __CUDACC__
SHARE4V_INLINE float to_float(bf16 value) { return __bfloat162float(value); }
template <class T>
SHARE4V_INLINE T from_float(float value);
template <>
SHARE4V_INLINE float from_float<float>(float value) {
  return value;
}
template <>
SHARE4V_INLINE bf16 from_float<bf16>(float value) {
  return __float2bfloat16(value);
}
#else
SHARE4V_INLINE float to_float(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
template <class T>
SHARE4V_INLINE T from_float(float value);
template <>
SHARE4V_INLINE float from_float<float>(float value) {
  return value;
}
// To nearest, ties to even; NaN stays NaN. Branch-free, so that loops vectorize.
template <>
SHARE4V_INLINE bf16 from_float<bf16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bf16{static_cast<uint16_t>(value == value ? rounded : 0x7fc0u)};
}
#endif

// Calls `body` with a value of the element type `type`: with_type(type, [&](auto zero) { using T = decltype(zero); ...
// }).
template <class Body>
int with_type(int type, Body body) {
  switch (type) {
    case kFloat32:
      return body(float{});
    case kBFloat16:
      return body(bf16{});
    default:
      return kUnknownType;
  }
}
