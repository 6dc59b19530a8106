// CPU AdamW: one pass over weight, gradient and moments; threads split the chunks of all tensors.
#include <vector>

#include "../common/host.h"
#include "update.h"

namespace {

constexpr int64_t kChunk = 1 << 14;
constexpr int64_t kFloatSum = 4096;  // squares summed in fp32 before fp64

template <class W, class G, class M, bool kStochastic>
SHARE4V_CLONES void update_range(W* __restrict__ weight, const G* __restrict__ grad, M* __restrict__ mean,
                                 M* __restrict__ square, uint32_t key, uint32_t other_key, float scale,
                                 const Update& by, int64_t begin, int64_t end) {
  const Update update = by;
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t noise = kStochastic ? random_bits(static_cast<uint32_t>(i), key, other_key) : 0u;
    update_element(weight[i], mean[i], square[i], to_float(grad[i]) * scale, update, kStochastic, noise);
  }
}

template <class T>
SHARE4V_CLONES float squares_of_range(const T* values, int64_t begin, int64_t end) {
  double total = 0.0;
  for (int64_t start = begin; start < end; start += kFloatSum) {
    const int64_t stop = start + kFloatSum < end ? start + kFloatSum : end;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < stop; ++i) sum += to_float(values[i]) * to_float(values[i]);
    total += sum;
  }
  return static_cast<float>(total);
}

// Calls body(tensor, begin, end, chunk) for every chunk of `size` elements of `count` tensors, in parallel.
template <class Body>
void each_chunk(int count, const int64_t* elements, int64_t size, const Body& body) {
  std::vector<int64_t> first(count + 1, 0);
  for (int i = 0; i < count; ++i) first[i + 1] = first[i] + (elements[i] + size - 1) / size;
  parallel_rows(first[count], size, [&](int64_t begin, int64_t end) {
    int tensor = static_cast<int>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first[tensor + 1]) ++tensor;
      const int64_t start = (chunk - first[tensor]) * size;
      body(tensor, start, std::min(start + size, elements[tensor]), chunk);
    }
  });
}

}  // namespace

extern "C" int share4v_adamw_cpu(const int* types, int count, void* const* weights, const void* const* grads,
                                 void* const* means, void* const* squares, const int64_t* elements,
                                 const uint32_t* keys, const float* scale, const Update* update, void*) {
  const float factor = scale ? *scale : 1.0f;
  return with_type(types[0], [&](auto zero_weight) {
    return with_type(types[1], [&](auto zero_grad) {
      return with_type(types[2], [&](auto zero_mean) {
        using W = decltype(zero_weight);
        using G = decltype(zero_grad);
        using M = decltype(zero_mean);
        const auto range = update->stochastic ? update_range<W, G, M, true> : update_range<W, G, M, false>;
        each_chunk(count, elements, kChunk, [&](int i, int64_t begin, int64_t end, int64_t) {
          range(static_cast<W*>(weights[i]), static_cast<const G*>(grads[i]), static_cast<M*>(means[i]),
                static_cast<M*>(squares[i]), keys[2 * i], keys[2 * i + 1], factor, *update, begin, end);
        });
        return static_cast<int>(kDone);
      });
    });
  });
}

extern "C" int share4v_sum_of_squares_cpu(int type, int count, const void* const* tensors, const int64_t* elements,
                                          float* partial, int64_t chunks, float* to, void*) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    each_chunk(count, elements, kSquaresChunk, [&](int i, int64_t begin, int64_t end, int64_t chunk) {
      partial[chunk] = squares_of_range(static_cast<const T*>(tensors[i]), begin, end);
    });
    double total = 0.0;
    for (int64_t i = 0; i < chunks; ++i) total += partial[i];
    *to = static_cast<float>(total);
    return static_cast<int>(kDone);
  });
}
