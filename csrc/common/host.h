// Helpers of cpu.cpp files: run-time dispatch on the instruction set, and parallel loops over rows above a size.
#pragma once

#include <algorithm>
#include <cstdint>

#include "types.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// Attribute of a function that loops over contiguous elements: it is compiled for plain x86-64, AVX2 and AVX-512, and
// the loader selects one. Reductions need `#pragma omp simd reduction(+ : sum)` to vectorize. Not for a function that
// starts threads: its outlined body would not be cloned.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define SHARE4V_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SHARE4V_CLONES
#endif

// Number of elements below which a second thread costs more than it saves.
constexpr int64_t kParallelAbove = 1 << 16;

// Calls body(begin, end) on one contiguous range of [0, rows) per thread; on the calling thread only where `rows *
// width` is small.
template <class Body>
void parallel_rows(int64_t rows, int64_t width, const Body& body) {
#ifdef _OPENMP
  const int64_t threads = std::min<int64_t>(rows, omp_get_max_threads());
  if (threads > 1 && rows * width > kParallelAbove && !omp_in_parallel()) {
#pragma omp parallel num_threads(static_cast <int>(threads))
    {
      const int64_t count = omp_get_num_threads(), rank = omp_get_thread_num();
      body(rows * rank / count, rows * (rank + 1) / count);
    }
    return;
  }
#endif
  if (rows > 0) body(int64_t{0}, rows);
}

// Sums columns [begin, end) of `partial` [chunks, stride] into `to`.
template <class T>
SHARE4V_CLONES static void reduce_columns(const float* partial, T* to, int64_t chunks, int64_t stride, int64_t begin,
                                          int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    float total = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * stride + i];
    to[i] = from_float<T>(total);
  }
}
