// Column reduction for cuda.cu files whose blocks write partial sums.
#pragma once

#include "device.cuh"

// Unnamed namespace: each file has kernels of its own.
namespace {

constexpr int kColumnThreads = 256;

// Sums the columns of `partial` [chunks, stride]: a warp has 32 neighboring columns, each warp of a block every eighth
// chunk.
template <class T>
__global__ void __launch_bounds__(kColumnThreads) reduce_columns(const float* __restrict__ partial, T* __restrict__ to,
                                                                 int64_t chunks, int64_t stride, int64_t width) {
  constexpr int kWarps = kColumnThreads / kWarp;
  __shared__ float sums[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float total = 0.0f;
  if (column < width) {
    for (int64_t chunk = warp; chunk < chunks; chunk += kWarps) total += partial[chunk * stride + column];
  }
  sums[warp][lane] = total;
  __syncthreads();
  if (warp == 0 && column < width) {
    for (int i = 1; i < kWarps; ++i) total += sums[i][lane];
    to[column] = from_float<T>(total);
  }
}

// `to` [width] = sum of `partial` [chunks, stride] over the chunks.
template <class T>
int launch_reduce_columns(const float* partial, T* to, int64_t chunks, int64_t stride, int64_t width, void* stream) {
  const dim3 columns(static_cast<unsigned>((width + kWarp - 1) / kWarp));
  return launch(reduce_columns<T>, columns, dim3(kColumnThreads), 0, stream, partial, to, chunks, stride, width);
}

}  // namespace
