// CPU norms: sums in fp32; a row is read for its sums and again for its output, while it is in the L1 cache.
#include <cmath>

#include "../common/host.h"

namespace {

template <class T, bool kLayer, bool kResidual>
SHARE4V_CLONES void forward_rows(const T* x, const T* residual, const T* weight, const T* bias, T* sum, T* y,
                                 float* mean, float* rstd, int64_t begin, int64_t end, int64_t width, float eps) {
  for (int64_t row = begin; row < end; ++row) {
    const T* in = x + row * width;
    if (kResidual) {
      const T* other = residual + row * width;
      T* added = sum + row * width;
      for (int64_t i = 0; i < width; ++i) added[i] = from_float<T>(to_float(in[i]) + to_float(other[i]));
      in = added;
    }
    float centre = 0.0f;
    if (kLayer) {
#pragma omp simd reduction(+ : centre)
      for (int64_t i = 0; i < width; ++i) centre += to_float(in[i]);
      centre /= static_cast<float>(width);
      mean[row] = centre;
    }
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) {
      const float value = to_float(in[i]) - centre;
      squares += value * value;
    }
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    rstd[row] = scale;
    T* out = y + row * width;
    for (int64_t i = 0; i < width; ++i) {
      const float value = (to_float(in[i]) - centre) * scale * to_float(weight[i]);
      out[i] = from_float<T>(kLayer ? value + to_float(bias[i]) : value);
    }
  }
}

// Also adds these rows' part of the weight (and bias) gradient to `weight_part`.
template <class T, bool kLayer, bool kResidual>
SHARE4V_CLONES void backward_rows(const T* grad, const T* grad_sum, const T* x, const T* weight, const float* mean,
                                  const float* rstd, T* grad_x, float* weight_part, int64_t begin, int64_t end,
                                  int64_t width) {
  float* bias_part = weight_part + width;
  for (int64_t i = 0; i < (kLayer ? 2 * width : width); ++i) weight_part[i] = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const T *g = grad + row * width, *in = x + row * width;
    const float scale = rstd[row], centre = kLayer ? mean[row] : 0.0f;
    float along = 0.0f, level = 0.0f;
#pragma omp simd reduction(+ : along, level)
    for (int64_t i = 0; i < width; ++i) {
      const float slope = to_float(g[i]), normal = (to_float(in[i]) - centre) * scale, product = slope * normal;
      weight_part[i] += product;
      along += product * to_float(weight[i]);
      if (kLayer) {
        bias_part[i] += slope;
        level += slope * to_float(weight[i]);
      }
    }
    along /= static_cast<float>(width);
    level /= static_cast<float>(width);
    T* out = grad_x + row * width;
    const T* straight = kResidual ? grad_sum + row * width : nullptr;
    for (int64_t i = 0; i < width; ++i) {
      const float normal = (to_float(in[i]) - centre) * scale;
      float value = scale * (to_float(g[i]) * to_float(weight[i]) - level - normal * along);
      if (kResidual) value += to_float(straight[i]);
      out[i] = from_float<T>(value);
    }
  }
}

}  // namespace

extern "C" int share4v_norm_forward_cpu(int type, const void* x, const void* residual, const void* weight,
                                        const void* bias, void* sum, void* y, float* mean, float* rstd, int64_t rows,
                                        int64_t width, float eps, void*) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto rows_of = bias       ? forward_rows<T, true, false>
                         : residual ? forward_rows<T, false, true>
                                    : forward_rows<T, false, false>;
    parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
      rows_of(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
              static_cast<const T*>(bias), static_cast<T*>(sum), static_cast<T*>(y), mean, rstd, begin, end, width,
              eps);
    });
    return static_cast<int>(kDone);
  });
}

extern "C" int share4v_norm_backward_cpu(int type, const void* grad, const void* grad_sum, const void* x,
                                         const void* weight, const float* mean, const float* rstd, void* grad_x,
                                         void* grad_weight, void* grad_bias, float* partial, int64_t chunks,
                                         int64_t rows, int64_t width, void*) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    // Not by `mean`, which is also null where there are no rows.
    const bool layer = grad_bias != nullptr;
    const auto rows_of = layer      ? backward_rows<T, true, false>
                         : grad_sum ? backward_rows<T, false, true>
                                    : backward_rows<T, false, false>;
    const int64_t stride = layer ? 2 * width : width;
    parallel_rows(chunks, rows / chunks * width, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        rows_of(static_cast<const T*>(grad), static_cast<const T*>(grad_sum), static_cast<const T*>(x),
                static_cast<const T*>(weight), mean, rstd, static_cast<T*>(grad_x), partial + chunk * stride,
                rows * chunk / chunks, rows * (chunk + 1) / chunks, width);
      }
    });
    reduce_columns(partial, static_cast<T*>(grad_weight), chunks, stride, 0, width);
    if (layer) reduce_columns(partial + width, static_cast<T*>(grad_bias), chunks, stride, 0, width);
    return static_cast<int>(kDone);
  });
}
