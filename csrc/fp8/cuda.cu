// CUDA FP8: the scale in one pass, divided by the last block; the cast in another, which can transpose through shared
// memory.
#include "../common/device.cuh"
#include "../common/fp8.h"

namespace {

constexpr int kThreads = 256, kMostBlocks = 1056, kTileRows = 128, kTileColumns = 64, kWords = kTileRows / 4;

// Two codes, that of `low` in the lower byte. One instruction from sm_89 on, which would saturate infinities to the
// maximum.
template <class F>
__device__ __forceinline__ uint32_t two_codes(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  const float nothing = __int_as_float(0x7fffffff);
  low = fabsf(low) <= 3.402823466e38f ? low : nothing;
  high = fabsf(high) <= 3.402823466e38f ? high : nothing;
  uint16_t codes;
  if (F::kMantissa == 3) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  }
  return codes;
#else
  return fp8_code<F>(low) | static_cast<uint32_t>(fp8_code<F>(high)) << 8;
#endif
}

template <class T, class F, int V>
__device__ __forceinline__ void encode(const Vector<T, V>& from, float inverse, uint8_t* to) {
  if constexpr (V == 1) {
    to[0] = static_cast<uint8_t>(two_codes<F>(to_float(from.at[0]) * inverse, 0.0f));
  } else {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      const uint32_t codes = two_codes<F>(to_float(from.at[k]) * inverse, to_float(from.at[k + 1]) * inverse);
      to[k] = static_cast<uint8_t>(codes);
      to[k + 1] = static_cast<uint8_t>(codes >> 8);
    }
  }
}

__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t partial[kThreads / kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int i = 0; i < kThreads / kWarp; ++i) value = partial[i] > value ? partial[i] : value;
  return value;
}

// scratch: the maximum magnitude so far, as an integer (which orders NaN above infinity), and the number of finished
// blocks; both start at 0.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    compute_scale(const T* __restrict__ x, float* scale, uint32_t* scratch, int64_t count, float least, float most) {
  uint32_t peak = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * V;
#pragma unroll 4
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; i < count; i += step) {
    const Vector<T, V> in = load<T, V>(x + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const uint32_t size = __float_as_uint(to_float(in.at[k])) & 0x7fffffffu;
      peak = size > peak ? size : peak;
    }
  }
  peak = block_max(peak);
  if (threadIdx.x) return;
  atomicMax(scratch, peak);
  __threadfence();
  if (atomicAdd(scratch + 1, 1u) != gridDim.x - 1) return;
  const float largest = __uint_as_float(atomicMax(scratch, 0u));
  *scale = (largest < least ? least : largest) / most;
}

// 16 elements per thread, or one.
template <class T, class F, int N>
__global__ void __launch_bounds__(kThreads)
    cast(const T* __restrict__ x, const float* __restrict__ scale, uint8_t* __restrict__ codes, int64_t count) {
  constexpr int V = N == 1 ? 1 : static_cast<int>(16 / sizeof(T));
  const float inverse = 1.0f / *scale;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (first >= count) return;
  Vector<uint8_t, N> out;
#pragma unroll
  for (int i = 0; i < N; i += V) encode<T, F, V>(load<T, V>(x + first + i), inverse, out.at + i);
  store<uint8_t, N>(codes + first, out);
}

// One tile per block. Four rows make a word of a column; a stride of 33 words puts neighboring columns into different
// banks.
template <class T, class F, int V>
__global__ void __launch_bounds__(kThreads)
    cast_transposed(const T* __restrict__ x, const float* __restrict__ scale, uint8_t* __restrict__ codes,
                    uint8_t* __restrict__ transposed, int64_t rows, int64_t columns, int64_t padded,
                    int64_t tiles_across) {
  __shared__ uint32_t tile[kTileColumns][kWords + 1];
  const float inverse = 1.0f / *scale;
  const int64_t top = blockIdx.x / tiles_across * kTileRows, left = blockIdx.x % tiles_across * kTileColumns;
  constexpr int kLanes = kTileColumns / V;
  for (int unit = threadIdx.x; unit < kLanes * kWords; unit += kThreads) {
    const int lane = unit % kLanes, word = unit / kLanes;
    const int64_t column = left + lane * V, row = top + word * 4;
    uint32_t words[V] = {};
    if (column < columns) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (row + j >= rows) break;
        Vector<uint8_t, V> out;
        encode<T, F, V>(load<T, V>(x + (row + j) * columns + column), inverse, out.at);
        if (codes) store<uint8_t, V>(codes + (row + j) * columns + column, out);
#pragma unroll
        for (int k = 0; k < V; ++k) words[k] |= static_cast<uint32_t>(out.at[k]) << (8 * j);
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) tile[lane * V + k][word] = words[k];
  }
  __syncthreads();
  constexpr int kPieces = kTileRows / 16;
  for (int unit = threadIdx.x; unit < kPieces * kTileColumns; unit += kThreads) {
    const int piece = unit % kPieces, column = unit / kPieces;
    const int64_t row = top + piece * 16;
    if (left + column >= columns || row >= padded) continue;
    Vector<uint32_t, 4> out;
#pragma unroll
    for (int k = 0; k < 4; ++k) out.at[k] = tile[column][piece * 4 + k];
    store<uint32_t, 4>(reinterpret_cast<uint32_t*>(transposed + (left + column) * padded + row), out);
  }
}

unsigned blocks_of(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

template <class T, class F>
int cast_any(const T* x, const float* scale, uint8_t* codes, uint8_t* transposed, int64_t rows, int64_t columns,
             int64_t padded, void* stream) {
  const int64_t count = rows * columns;
  if (count == 0) return kDone;
  if (!transposed) {
    const bool wide = count % 16 == 0 && can_vectorize<T>(16, x, codes);
    const auto kernel = wide ? cast<T, F, 16> : cast<T, F, 1>;
    return launch(kernel, dim3(blocks_of(count, kThreads * (wide ? 16 : 1))), dim3(kThreads), 0, stream, x, scale,
                  codes, count);
  }
  const int64_t across = (columns + kTileColumns - 1) / kTileColumns, down = (padded + kTileRows - 1) / kTileRows;
  return with_vector<T>(can_vectorize<T>(columns, x, codes), [&](auto length) {
    return launch(cast_transposed<T, F, decltype(length)::value>, dim3(static_cast<unsigned>(across * down)),
                  dim3(kThreads), 0, stream, x, scale, codes, transposed, rows, columns, padded, across);
  });
}

}  // namespace

extern "C" int share4v_fp8_scale_cuda(int type, bool e5m2, const void* x, float* scale, uint32_t* scratch,
                                      int64_t count, float least, void* stream) {
  const int status = static_cast<int>(cudaMemsetAsync(scratch, 0, 8, static_cast<cudaStream_t>(stream)));
  if (status) return status;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_vector<T>(can_vectorize<T>(count, x), [&](auto length) {
      constexpr int V = decltype(length)::value;
      const int64_t blocks = count / (kThreads * V * 4) + 1;
      return launch(compute_scale<T, V>, dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)),
                    dim3(kThreads), 0, stream, static_cast<const T*>(x), scale, scratch, count, least,
                    e5m2 ? E5M2::kLargest : E4M3::kLargest);
    });
  });
}

extern "C" int share4v_fp8_cast_cuda(int type, bool e5m2, const void* x, const float* scale, uint8_t* codes,
                                     uint8_t* transposed, int64_t rows, int64_t columns, int64_t padded, void* stream) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto cast_to = e5m2 ? cast_any<T, E5M2> : cast_any<T, E4M3>;
    return cast_to(static_cast<const T*>(x), scale, codes, transposed, rows, columns, padded, stream);
  });
}
