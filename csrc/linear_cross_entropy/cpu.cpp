// CPU cross-entropy of a block of logits: two passes over a row for its statistics, one for its gradient, while it is
// in the cache.
#include <cfloat>
#include <cmath>

#include "../common/exponential.h"
#include "../common/host.h"

namespace {

template <class T>
SHARE4V_CLONES void statistics_rows(const T* logits, const int64_t* targets, float* maximum, float* total,
                                    float* target, int64_t begin, int64_t end, int64_t width, int64_t columns,
                                    int64_t first) {
  for (int64_t row = begin; row < end; ++row) {
    const T* in = logits + row * width;
    const float before = maximum[row];
    float peak = before, sum = 0.0f;
#pragma omp simd reduction(max : peak)
    for (int64_t i = 0; i < columns; ++i) {
      const float value = to_float(in[i]);
      peak = value > peak ? value : peak;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < columns; ++i) sum += exponential(to_float(in[i]) - peak);
    maximum[row] = peak;
    total[row] = total[row] * std::exp(before - peak) + sum;
    const int64_t column = targets[row] - first;
    if (column >= 0 && column < columns) target[row] = to_float(in[column]);
  }
}

template <class T>
SHARE4V_CLONES void gradient_rows(T* logits, const int64_t* targets, const float* normaliser, float scale,
                                  int64_t begin, int64_t end, int64_t width, int64_t columns, int64_t first) {
  for (int64_t row = begin; row < end; ++row) {
    T* values = logits + row * width;
    const float level = normaliser[row];
    const int64_t column = targets[row] - first;
    const bool here = column >= 0 && column < columns;
    const float own = here ? to_float(values[column]) : 0.0f;
    for (int64_t i = 0; i < columns; ++i) values[i] = from_float<T>(exponential(to_float(values[i]) - level) * scale);
    for (int64_t i = columns; i < width; ++i) values[i] = from_float<T>(0.0f);
    if (here) values[column] = from_float<T>((exponential(own - level) - 1.0f) * scale);
  }
}

bool all_inside(const int64_t* targets, int64_t rows, int64_t vocabulary) {
  bool inside = true;
  for (int64_t row = 0; row < rows; ++row) inside &= targets[row] >= 0 && targets[row] < vocabulary;
  return inside;
}

int64_t real_columns(int64_t width, int64_t first, int64_t vocabulary) {
  return std::max<int64_t>(0, std::min(width, vocabulary - first));
}

}  // namespace

extern "C" int share4v_cross_entropy_statistics_cpu(int type, const void* logits, const int64_t* targets,
                                                    float* maximum, float* total, float* target, int64_t rows,
                                                    int64_t width, int64_t first, int64_t vocabulary, void*) {
  if (!all_inside(targets, rows, vocabulary)) return kIndexOutOfRange;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
      statistics_rows(static_cast<const T*>(logits), targets, maximum, total, target, begin, end, width,
                      real_columns(width, first, vocabulary), first);
    });
    return static_cast<int>(kDone);
  });
}

extern "C" int share4v_cross_entropy_gradient_cpu(int type, void* logits, const int64_t* targets,
                                                  const float* normaliser, const float* scale, int64_t rows,
                                                  int64_t width, int64_t first, int64_t vocabulary, void*) {
  if (!all_inside(targets, rows, vocabulary)) return kIndexOutOfRange;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
      gradient_rows(static_cast<T*>(logits), targets, normaliser, *scale, begin, end, width,
                    real_columns(width, first, vocabulary), first);
    });
    return static_cast<int>(kDone);
  });
}
