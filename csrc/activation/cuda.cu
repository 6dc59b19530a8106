// CUDA activations: a thread has 16 bytes of columns and loops over rows, so that the bias and its gradient stay in
// registers.
#include "../common/reduce.cuh"
#include "formulas.h"

namespace {

constexpr int kThreads = 128, kRowsOfThread = 4;

// Hardware exponential and reciprocal, to a few ulp.
struct Math {
  static __device__ __forceinline__ float exponential(float x) { return __expf(x); }
  static __device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }
};

template <class T, int V>
__device__ __forceinline__ Vector<T, V> load_or_zero(const T* from, int64_t at) {
  if (from) return load<T, V>(from + at);
  Vector<T, V> zero;
#pragma unroll
  for (int k = 0; k < V; ++k) zero.at[k] = from_float<T>(0.0f);
  return zero;
}

template <class T, int V, int kKind>
__global__ void __launch_bounds__(kThreads)
    forward(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, int64_t rows, int64_t width) {
  constexpr bool kGated = kKind == kSwiglu;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V,
                columns = kGated ? 2 * width : width;
  if (column >= width) return;
  const Vector<T, V> shift = load_or_zero<T, V>(bias, column);
  Vector<T, V> up_shift;
  if (kGated) up_shift = load_or_zero<T, V>(bias, width + column);
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const Vector<T, V> in = load<T, V>(x + row * columns + column);
    Vector<T, V> up, out;
    if (kGated) up = load<T, V>(x + row * columns + width + column);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      float value = activate<kKind, Math>(to_float(in.at[k]) + to_float(shift.at[k])).value;
      if (kGated) value *= to_float(up.at[k]) + to_float(up_shift.at[k]);
      out.at[k] = from_float<T>(value);
    }
    store<T, V>(y + row * width + column, out);
  }
}

template <class T, int V, int kKind>
__global__ void __launch_bounds__(kThreads)
    backward(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ grad_x,
             float* __restrict__ partial, int64_t rows, int64_t width) {
  constexpr bool kGated = kKind == kSwiglu;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V,
                columns = kGated ? 2 * width : width;
  if (column >= width) return;
  const Vector<T, V> shift = load_or_zero<T, V>(bias, column);
  Vector<T, V> up_shift;
  if (kGated) up_shift = load_or_zero<T, V>(bias, width + column);
  float sums[kGated ? 2 : 1][V] = {};
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const Vector<T, V> slope = load<T, V>(grad + row * width + column), in = load<T, V>(x + row * columns + column);
    Vector<T, V> up, out, up_out;
    if (kGated) up = load<T, V>(x + row * columns + width + column);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Value at = activate<kKind, Math>(to_float(in.at[k]) + to_float(shift.at[k]));
      float along = to_float(slope.at[k]) * at.slope;
      if (kGated) {
        along *= to_float(up.at[k]) + to_float(up_shift.at[k]);
        const float of_up = to_float(slope.at[k]) * at.value;
        up_out.at[k] = from_float<T>(of_up);
        sums[kGated][k] += of_up;
      }
      out.at[k] = from_float<T>(along);
      sums[0][k] += along;
    }
    store<T, V>(grad_x + row * columns + column, out);
    if (kGated) store<T, V>(grad_x + row * columns + width + column, up_out);
  }
  if (!partial) return;
  float* const block_partial = partial + blockIdx.y * columns + column;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    block_partial[k] = sums[0][k];
    if (kGated) block_partial[width + k] = sums[kGated][k];
  }
}

// Grid of (column blocks, row blocks).
dim3 grid_of(int64_t width, int vector, int64_t chunks) {
  return dim3(static_cast<unsigned>((width + kThreads * vector - 1) / (kThreads * vector)),
              static_cast<unsigned>(chunks < 65535 ? chunks : 65535));
}

}  // namespace

extern "C" int share4v_activation_forward_cuda(int type, int kind, const void* x, const void* bias, void* y,
                                               int64_t rows, int64_t width, void* stream) {
  if (rows == 0) return kDone;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_vector<T>(can_vectorize<T>(width, x, bias, y), [&](auto length) {
      constexpr int V = decltype(length)::value;
      const auto kernel = kind == kGelu        ? forward<T, V, kGelu>
                          : kind == kQuickGelu ? forward<T, V, kQuickGelu>
                          : kind == kGeluTanh  ? forward<T, V, kGeluTanh>
                                               : forward<T, V, kSwiglu>;
      return launch(kernel, grid_of(width, V, (rows + kRowsOfThread - 1) / kRowsOfThread), dim3(kThreads), 0, stream,
                    static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), rows, width);
    });
  });
}

extern "C" int share4v_activation_backward_cuda(int type, int kind, const void* grad, const void* x, const void* bias,
                                                void* grad_x, void* grad_bias, float* partial, int64_t chunks,
                                                int64_t rows, int64_t width, void* stream) {
  const int64_t columns = kind == kSwiglu ? 2 * width : width;
  if (rows == 0 && !grad_bias) return kDone;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int status = with_vector<T>(can_vectorize<T>(width, grad, x, bias, grad_x), [&](auto length) {
      constexpr int V = decltype(length)::value;
      const auto kernel = kind == kGelu        ? backward<T, V, kGelu>
                          : kind == kQuickGelu ? backward<T, V, kQuickGelu>
                          : kind == kGeluTanh  ? backward<T, V, kGeluTanh>
                                               : backward<T, V, kSwiglu>;
      const dim3 grid = grid_of(width, V, partial ? chunks : (rows + kRowsOfThread - 1) / kRowsOfThread);
      return launch(kernel, grid, dim3(kThreads), 0, stream, static_cast<const T*>(grad), static_cast<const T*>(x),
                    static_cast<const T*>(bias), static_cast<T*>(grad_x), partial, rows, width);
    });
    if (status || !grad_bias) return status;
    return launch_reduce_columns(partial, static_cast<T*>(grad_bias), chunks, columns, columns, stream);
  });
}
