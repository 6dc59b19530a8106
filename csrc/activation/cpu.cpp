// CPU activations: one pass, in fp32; backward recomputes them. `omp simd` asserts that arrays do not overlap;
// otherwise the compiler would need more run-time checks than it allows. W is the width of the result, a gated input
// has 2 W columns.
#include "../common/exponential.h"
#include "../common/host.h"
#include "formulas.h"

namespace {

struct Math {
  static SHARE4V_INLINE float exponential(float x) { return ::exponential(x); }
  static SHARE4V_INLINE float reciprocal(float x) { return 1.0f / x; }
};

template <class T, int kKind, bool kBias>
SHARE4V_CLONES void forward_rows(const T* x, const T* bias, T* y, int64_t begin, int64_t end, int64_t width) {
  constexpr bool kGated = kKind == kSwiglu;
  for (int64_t row = begin; row < end; ++row) {
    const T* in = x + row * (kGated ? 2 * width : width);
    T* out = y + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      float value = activate<kKind, Math>(to_float(in[i]) + (kBias ? to_float(bias[i]) : 0.0f)).value;
      if (kGated) value *= to_float(in[width + i]) + (kBias ? to_float(bias[width + i]) : 0.0f);
      out[i] = from_float<T>(value);
    }
  }
}

// Also adds these rows' part of the bias gradient to `part`.
template <class T, int kKind, bool kBias>
SHARE4V_CLONES void backward_rows(const T* grad, const T* x, const T* bias, T* grad_x, float* part, int64_t begin,
                                  int64_t end, int64_t width) {
  constexpr bool kGated = kKind == kSwiglu;
  const int64_t columns = kGated ? 2 * width : width;
  if (kBias) {
    for (int64_t i = 0; i < columns; ++i) part[i] = 0.0f;
  }
  for (int64_t row = begin; row < end; ++row) {
    const T *slope = grad + row * width, *in = x + row * columns;
    T* out = grad_x + row * columns;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const Value at = activate<kKind, Math>(to_float(in[i]) + (kBias ? to_float(bias[i]) : 0.0f));
      float along = to_float(slope[i]) * at.slope;
      if (kGated) {
        along *= to_float(in[width + i]) + (kBias ? to_float(bias[width + i]) : 0.0f);
        const float up = to_float(slope[i]) * at.value;
        out[width + i] = from_float<T>(up);
        if (kBias) part[width + i] += up;
      }
      out[i] = from_float<T>(along);
      if (kBias) part[i] += along;
    }
  }
}

// Calls `body` with the kind as a constant.
template <class Body>
int with_kind(int kind, Body body) {
  if (kind == kGelu) return body(std::integral_constant<int, kGelu>{});
  if (kind == kQuickGelu) return body(std::integral_constant<int, kQuickGelu>{});
  if (kind == kGeluTanh) return body(std::integral_constant<int, kGeluTanh>{});
  return body(std::integral_constant<int, kSwiglu>{});
}

}  // namespace

extern "C" int share4v_activation_forward_cpu(int type, int kind, const void* x, const void* bias, void* y,
                                              int64_t rows, int64_t width, void*) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_kind(kind, [&](auto constant) {
      constexpr int kKind = decltype(constant)::value;
      const auto rows_of = bias ? forward_rows<T, kKind, true> : forward_rows<T, kKind, false>;
      parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
        rows_of(static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), begin, end, width);
      });
      return static_cast<int>(kDone);
    });
  });
}

extern "C" int share4v_activation_backward_cpu(int type, int kind, const void* grad, const void* x, const void* bias,
                                               void* grad_x, void* grad_bias, float* partial, int64_t chunks,
                                               int64_t rows, int64_t width, void*) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_kind(kind, [&](auto constant) {
      constexpr int kKind = decltype(constant)::value;
      const auto rows_of = bias ? backward_rows<T, kKind, true> : backward_rows<T, kKind, false>;
      const int64_t columns = kKind == kSwiglu ? 2 * width : width;
      parallel_rows(chunks, rows / chunks * width, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          rows_of(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(bias),
                  static_cast<T*>(grad_x), bias ? partial + chunk * columns : nullptr, rows * chunk / chunks,
                  rows * (chunk + 1) / chunks, width);
        }
      });
      if (bias) reduce_columns(partial, static_cast<T*>(grad_bias), chunks, columns, 0, columns);
      return static_cast<int>(kDone);
    });
  });
}
