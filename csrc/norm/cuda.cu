// CUDA norms: one block per row forward; backward, blocks loop over rows and keep their part of the weight gradient in
// shared memory. A row is read twice, the second time from the cache.
#include "../common/reduce.cuh"

namespace {

constexpr int kForwardThreads = 512, kBackwardThreads = 512;

template <class T, int V, bool kLayer, bool kResidual>
__global__ void __launch_bounds__(kForwardThreads)
    forward(const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ weight,
            const T* __restrict__ bias, T* sum, T* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd,
            int64_t width, float eps) {
  const int64_t start = blockIdx.x * width;
  const int64_t step = static_cast<int64_t>(blockDim.x) * V;
  float totals[2] = {0.0f, 0.0f};  // of the values, of their squares
  for (int64_t i = threadIdx.x * V; i < width; i += step) {
    Vector<T, V> in = load<T, V>(x + start + i);
    if (kResidual) {
      const Vector<T, V> other = load<T, V>(residual + start + i);
#pragma unroll
      for (int k = 0; k < V; ++k) in.at[k] = from_float<T>(to_float(in.at[k]) + to_float(other.at[k]));
      store<T, V>(sum + start + i, in);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float value = to_float(in.at[k]);
      totals[0] += value;
      if (!kLayer) totals[1] += value * value;
    }
  }
  // The normalized input; with a residual, each thread reads back what it wrote itself.
  const T* const row = (kResidual ? sum : x) + start;
  block_sum(totals);
  const float centre = kLayer ? totals[0] / width : 0.0f;
  if (kLayer) {
    // A second pass, since E[x^2] - E[x]^2 cancels.
    float squares[1] = {0.0f};
    for (int64_t i = threadIdx.x * V; i < width; i += step) {
      const Vector<T, V> in = load<T, V>(row + i);
#pragma unroll
      for (int k = 0; k < V; ++k) squares[0] += (to_float(in.at[k]) - centre) * (to_float(in.at[k]) - centre);
    }
    block_sum(squares);
    totals[1] = squares[0];
  }
  const float scale = rsqrtf(totals[1] / width + eps);
  for (int64_t i = threadIdx.x * V; i < width; i += step) {
    const Vector<T, V> in = load<T, V>(row + i), by = load<T, V>(weight + i);
    Vector<T, V> plus, out;
    if (kLayer) plus = load<T, V>(bias + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float value = (to_float(in.at[k]) - centre) * scale * to_float(by.at[k]);
      out.at[k] = from_float<T>(kLayer ? value + to_float(plus.at[k]) : value);
    }
    store<T, V>(y + start + i, out);
  }
  if (threadIdx.x == 0) {
    rstd[blockIdx.x] = scale;
    if (kLayer) mean[blockIdx.x] = centre;
  }
}

template <class T, int V, bool kLayer, bool kResidual>
__global__ void __launch_bounds__(kBackwardThreads)
    backward(const T* __restrict__ grad, const T* __restrict__ grad_sum, const T* __restrict__ x,
             const T* __restrict__ weight, const float* __restrict__ mean, const float* __restrict__ rstd,
             T* __restrict__ grad_x, float* __restrict__ partial, int64_t rows, int64_t width) {
  // A thread has the same columns in every row, so its sums need no barrier. Element k of vector j is at k * vectors +
  // j: neighboring threads use neighboring banks.
  SHARE4V_DYNAMIC_SHARED(weight_part);
  float* const bias_part = weight_part + width;
  const int vectors = static_cast<int>(width / V);
  for (int i = threadIdx.x; i < (kLayer ? 2 : 1) * width; i += blockDim.x) weight_part[i] = 0.0f;
  __syncthreads();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T *g = grad + row * width, *in = x + row * width;
    const float scale = rstd[row], centre = kLayer ? mean[row] : 0.0f;
    float totals[kLayer ? 2 : 1] = {};  // of gradient * weight * normalized, of gradient * weight
    for (int j = threadIdx.x; j < vectors; j += blockDim.x) {
      const Vector<T, V> slope = load<T, V>(g + j * V), value = load<T, V>(in + j * V), by = load<T, V>(weight + j * V);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float product = to_float(slope.at[k]) * ((to_float(value.at[k]) - centre) * scale);
        weight_part[k * vectors + j] += product;
        totals[0] += product * to_float(by.at[k]);
        if (kLayer) {
          bias_part[k * vectors + j] += to_float(slope.at[k]);
          totals[kLayer] += to_float(slope.at[k]) * to_float(by.at[k]);
        }
      }
    }
    block_sum(totals);
    const float along = totals[0] / width, level = kLayer ? totals[kLayer] / width : 0.0f;
    for (int j = threadIdx.x; j < vectors; j += blockDim.x) {
      const Vector<T, V> slope = load<T, V>(g + j * V), value = load<T, V>(in + j * V), by = load<T, V>(weight + j * V);
      Vector<T, V> straight, out;
      if (kResidual) straight = load<T, V>(grad_sum + row * width + j * V);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float normal = (to_float(value.at[k]) - centre) * scale;
        float result = scale * (to_float(slope.at[k]) * to_float(by.at[k]) - level - normal * along);
        if (kResidual) result += to_float(straight.at[k]);
        out.at[k] = from_float<T>(result);
      }
      store<T, V>(grad_x + row * width + j * V, out);
    }
  }
  float* const block_partial = partial + blockIdx.x * (kLayer ? 2 * width : width);
  for (int j = threadIdx.x; j < vectors; j += blockDim.x) {
    for (int k = 0; k < V; ++k) {
      block_partial[j * V + k] = weight_part[k * vectors + j];
      if (kLayer) block_partial[width + j * V + k] = bias_part[k * vectors + j];
    }
  }
}

}  // namespace

extern "C" int share4v_norm_forward_cuda(int type, const void* x, const void* residual, const void* weight,
                                         const void* bias, void* sum, void* y, float* mean, float* rstd, int64_t rows,
                                         int64_t width, float eps, void* stream) {
  if (rows == 0) return kDone;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_vector<T>(can_vectorize<T>(width, x, residual, weight, bias, sum, y), [&](auto length) {
      constexpr int V = decltype(length)::value;
      const auto kernel = bias       ? forward<T, V, true, false>
                          : residual ? forward<T, V, false, true>
                                     : forward<T, V, false, false>;
      return launch(kernel, dim3(static_cast<unsigned>(rows)), dim3(threads_for(width / V, kForwardThreads)), 0, stream,
                    static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
                    static_cast<const T*>(bias), static_cast<T*>(sum), static_cast<T*>(y), mean, rstd, width, eps);
    });
  });
}

extern "C" int share4v_norm_backward_cuda(int type, const void* grad, const void* grad_sum, const void* x,
                                          const void* weight, const float* mean, const float* rstd, void* grad_x,
                                          void* grad_weight, void* grad_bias, float* partial, int64_t chunks,
                                          int64_t rows, int64_t width, void* stream) {
  // Not by `mean`, which is also null where there are no rows.
  const bool layer = grad_bias != nullptr;
  const int64_t stride = layer ? 2 * width : width;
  const size_t shared = sizeof(float) * static_cast<size_t>(stride);
  if (shared > kSharedLimit) return kTooWide;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    int status = with_vector<T>(can_vectorize<T>(width, grad, grad_sum, x, weight, grad_x), [&](auto length) {
      constexpr int V = decltype(length)::value;
      const auto kernel = layer      ? backward<T, V, true, false>
                          : grad_sum ? backward<T, V, false, true>
                                     : backward<T, V, false, false>;
      return launch(kernel, dim3(static_cast<unsigned>(chunks)), dim3(threads_for(width / V, kBackwardThreads)), shared,
                    stream, static_cast<const T*>(grad), static_cast<const T*>(grad_sum), static_cast<const T*>(x),
                    static_cast<const T*>(weight), mean, rstd, static_cast<T*>(grad_x), partial, rows, width);
    });
    if (!status) status = launch_reduce_columns(partial, static_cast<T*>(grad_weight), chunks, stride, width, stream);
    if (!status && layer)
      status = launch_reduce_columns(partial + width, static_cast<T*>(grad_bias), chunks, stride, width, stream);
    return status;
  });
}
