// CUDA cross-entropy of a block of logits: one block per row. Statistics in one pass: each thread rescales its sum when
// its maximum grows.
#include <cfloat>

#include "../common/device.cuh"

namespace {

constexpr int kRowThreads = 512;

// Maximum over the block, in every thread; NaN is ignored. All threads must call.
__device__ __forceinline__ float block_max(float value) {
  __shared__ float partial[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  value = lane < warps ? partial[lane] : -FLT_MAX;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  // The next call overwrites `partial`.
  __syncthreads();
  return value;
}

template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    statistics(const T* __restrict__ logits, const int64_t* __restrict__ targets, float* __restrict__ maximum,
               float* __restrict__ total, float* __restrict__ target, int64_t width, int64_t columns, int64_t first,
               int64_t vocabulary) {
  const int64_t row = blockIdx.x;
  const T* const in = logits + row * width;
  // Finite, so that no difference of infinities arises.
  float most = -FLT_MAX, sum = 0.0f;
  for (int64_t i = threadIdx.x * V; i < columns; i += static_cast<int64_t>(blockDim.x) * V) {
    const Vector<T, V> values = load<T, V>(in + i);
    float peak = most;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (i + k < columns) peak = fmaxf(peak, to_float(values.at[k]));
    }
    sum *= __expf(most - peak);
    most = peak;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (i + k < columns) sum += __expf(to_float(values.at[k]) - peak);
    }
  }
  const float before = maximum[row], peak = block_max(fmaxf(most, before));
  float sums[1] = {sum * __expf(most - peak)};
  block_sum(sums);
  if (threadIdx.x == 0) {
    const int64_t id = targets[row], column = id - first;
    if (id < 0 || id >= vocabulary) __trap();
    maximum[row] = peak;
    total[row] = total[row] * __expf(before - peak) + sums[0];
    if (column >= 0 && column < columns) target[row] = to_float(in[column]);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    gradient(T* __restrict__ logits, const int64_t* __restrict__ targets, const float* __restrict__ normaliser,
             const float* __restrict__ scale, int64_t width, int64_t columns, int64_t first, int64_t vocabulary) {
  const int64_t row = blockIdx.x, id = targets[row], column = id - first;
  if (id < 0 || id >= vocabulary) __trap();
  const float level = normaliser[row], factor = *scale;
  T* const row_values = logits + row * width;
  for (int64_t i = threadIdx.x * V; i < width; i += static_cast<int64_t>(blockDim.x) * V) {
    Vector<T, V> values = load<T, V>(row_values + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float slope = __expf(to_float(values.at[k]) - level) - (i + k == column ? 1.0f : 0.0f);
      values.at[k] = from_float<T>(i + k < columns ? slope * factor : 0.0f);
    }
    store<T, V>(row_values + i, values);
  }
}

int64_t real_columns(int64_t width, int64_t first, int64_t vocabulary) {
  const int64_t left = vocabulary - first;
  return left < 0 ? 0 : left < width ? left : width;
}

}  // namespace

extern "C" int share4v_cross_entropy_statistics_cuda(int type, const void* logits, const int64_t* targets,
                                                     float* maximum, float* total, float* target, int64_t rows,
                                                     int64_t width, int64_t first, int64_t vocabulary, void* stream) {
  if (rows == 0) return kDone;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_vector<T>(can_vectorize<T>(width, logits), [&](auto length) {
      constexpr int V = decltype(length)::value;
      return launch(statistics<T, V>, dim3(static_cast<unsigned>(rows)), dim3(threads_for(width / V, kRowThreads)), 0,
                    stream, static_cast<const T*>(logits), targets, maximum, total, target, width,
                    real_columns(width, first, vocabulary), first, vocabulary);
    });
  });
}

extern "C" int share4v_cross_entropy_gradient_cuda(int type, void* logits, const int64_t* targets,
                                                   const float* normaliser, const float* scale, int64_t rows,
                                                   int64_t width, int64_t first, int64_t vocabulary, void* stream) {
  if (rows == 0) return kDone;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_vector<T>(can_vectorize<T>(width, logits), [&](auto length) {
      constexpr int V = decltype(length)::value;
      return launch(gradient<T, V>, dim3(static_cast<unsigned>(rows)), dim3(threads_for(width / V, kRowThreads)), 0,
                    stream, static_cast<T*>(logits), targets, normaliser, scale, width,
                    real_columns(width, first, vocabulary), first, vocabulary);
    });
  });
}
