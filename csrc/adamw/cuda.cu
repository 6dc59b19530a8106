// CUDA AdamW: as many tensors per launch as fit into the kernel parameters, one block per chunk of a tensor.
#include "../common/device.cuh"
#include "update.h"

namespace {

constexpr int kTensors = 48, kThreads = 256, kSumThreads = 1024;
constexpr int64_t kChunk = 1 << 14;
template <class T>
constexpr int kAccess = static_cast<int>(16 / sizeof(T));  // elements in 16 bytes

// Below the 4 KB limit of kernel parameters, so that a launch needs no copy to the device.
struct Table {
  void* weights[kTensors];
  const void* grads[kTensors];
  void* means[kTensors];
  void* squares[kTensors];
  int64_t elements[kTensors];
  uint32_t keys[2 * kTensors];
  int first_block[kTensors + 1];
};

struct Sources {
  const void* tensors[kTensors];
  int64_t elements[kTensors];
  int first_block[kTensors + 1];
};

// Index of this block's tensor.
template <class Blocks>
__device__ __forceinline__ int tensor_of_block(const Blocks& table) {
  int tensor = 0;
  while (static_cast<int>(blockIdx.x) >= table.first_block[tensor + 1]) ++tensor;
  return tensor;
}

template <class T>
__device__ __forceinline__ bool aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class T, int V>
__device__ __forceinline__ void load_values(const T* from, T (&to)[V]) {
  constexpr int N = V < kAccess<T> ? V : kAccess<T>;
#pragma unroll
  for (int j = 0; j < V; j += N) {
    const Vector<T, N> part = load<T, N>(from + j);
#pragma unroll
    for (int k = 0; k < N; ++k) to[j + k] = part.at[k];
  }
}

template <class T, int V>
__device__ __forceinline__ void store_values(T* to, const T (&from)[V]) {
  constexpr int N = V < kAccess<T> ? V : kAccess<T>;
#pragma unroll
  for (int j = 0; j < V; j += N) {
    Vector<T, N> part;
#pragma unroll
    for (int k = 0; k < N; ++k) part.at[k] = from[j + k];
    store<T, N>(to + j, part);
  }
}

template <class W, class G, class M>
__global__ void __launch_bounds__(kThreads, 3) update(Table table, const float* __restrict__ scale, Update by) {
  // 16 bytes of the narrowest type.
  constexpr int V = sizeof(W) == 4 && sizeof(G) == 4 && sizeof(M) == 4 ? 4 : 8;
  const int tensor = tensor_of_block(table);
  W* const weight = static_cast<W*>(table.weights[tensor]);
  const G* const grad = static_cast<const G*>(table.grads[tensor]);
  M *const mean = static_cast<M*>(table.means[tensor]), *const square = static_cast<M*>(table.squares[tensor]);
  const uint32_t key = table.keys[2 * tensor], other_key = table.keys[2 * tensor + 1];
  const float factor = scale ? *scale : 1.0f;
  // Rounding to fp32 is the identity, stochastic or not.
  const bool stochastic = (sizeof(W) == 2 || sizeof(M) == 2) && by.stochastic;
  const int64_t begin = (static_cast<int>(blockIdx.x) - table.first_block[tensor]) * kChunk,
                left = table.elements[tensor] - begin;
  const int size = static_cast<int>(left < kChunk ? left : kChunk);
  const int whole = aligned(weight) && aligned(grad) && aligned(mean) && aligned(square) ? size / V * V : 0;
  for (int i = threadIdx.x * V; i < whole; i += kThreads * V) {
    W weights[V];
    G grads[V];
    M means[V], squares[V];
    load_values<W, V>(weight + begin + i, weights);
    load_values<G, V>(grad + begin + i, grads);
    load_values<M, V>(mean + begin + i, means);
    load_values<M, V>(square + begin + i, squares);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const uint32_t noise = stochastic ? random_bits(static_cast<uint32_t>(begin + i + k), key, other_key) : 0u;
      update_element(weights[k], means[k], squares[k], to_float(grads[k]) * factor, by, stochastic, noise);
    }
    store_values<W, V>(weight + begin + i, weights);
    store_values<M, V>(mean + begin + i, means);
    store_values<M, V>(square + begin + i, squares);
  }
  for (int64_t i = begin + whole + threadIdx.x; i < begin + size; i += kThreads) {
    const uint32_t noise = stochastic ? random_bits(static_cast<uint32_t>(i), key, other_key) : 0u;
    update_element(weight[i], mean[i], square[i], to_float(grad[i]) * factor, by, stochastic, noise);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_chunk(Sources table, float* __restrict__ partial) {
  constexpr int V = kAccess<T>;
  const int tensor = tensor_of_block(table);
  const int64_t begin = (static_cast<int>(blockIdx.x) - table.first_block[tensor]) * kSquaresChunk,
                left = table.elements[tensor] - begin;
  const T* const values = static_cast<const T*>(table.tensors[tensor]) + begin;
  const int size = static_cast<int>(left < kSquaresChunk ? left : kSquaresChunk);
  const int whole = aligned(values) ? size / V * V : 0;
  float sums[1] = {0.0f};
  for (int i = threadIdx.x * V; i < whole; i += kThreads * V) {
    const Vector<T, V> part = load<T, V>(values + i);
#pragma unroll
    for (int k = 0; k < V; ++k) sums[0] += to_float(part.at[k]) * to_float(part.at[k]);
  }
  for (int i = whole + threadIdx.x; i < size; i += kThreads) sums[0] += to_float(values[i]) * to_float(values[i]);
  block_sum(sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

__global__ void __launch_bounds__(kSumThreads)
    sum_partials(const float* __restrict__ partial, int64_t chunks, float* __restrict__ to) {
  float sums[1] = {0.0f};
  for (int64_t i = threadIdx.x; i < chunks; i += kSumThreads) sums[0] += partial[i];
  block_sum(sums);
  if (threadIdx.x == 0) *to = sums[0];
}

// Fills tables with tensors and launches a kernel per table. fill(table, slot, tensor); start(table, blocks).
template <class Blocks, class Fill, class Start>
int in_tables(int count, const int64_t* elements, int64_t chunk, Fill fill, Start start) {
  for (int next = 0; next < count;) {
    Blocks table = {};
    int place = 0;
    for (; place < kTensors && next < count; ++next) {
      if (elements[next] == 0) continue;
      fill(table, place, next);
      table.elements[place] = elements[next];
      table.first_block[place + 1] = table.first_block[place] + static_cast<int>((elements[next] + chunk - 1) / chunk);
      ++place;
    }
    const int status = place ? start(table, table.first_block[place]) : kDone;
    if (status) return status;
  }
  return kDone;
}

}  // namespace

extern "C" int share4v_adamw_cuda(const int* types, int count, void* const* weights, const void* const* grads,
                                  void* const* means, void* const* squares, const int64_t* elements,
                                  const uint32_t* keys, const float* scale, const Update* by, void* stream) {
  const auto fill = [&](Table& table, int place, int i) {
    table.weights[place] = weights[i];
    table.grads[place] = grads[i];
    table.means[place] = means[i];
    table.squares[place] = squares[i];
    table.keys[2 * place] = keys[2 * i];
    table.keys[2 * place + 1] = keys[2 * i + 1];
  };
  return with_type(types[0], [&](auto zero_weight) {
    return with_type(types[1], [&](auto zero_grad) {
      return with_type(types[2], [&](auto zero_mean) {
        using W = decltype(zero_weight);
        using G = decltype(zero_grad);
        using M = decltype(zero_mean);
        return in_tables<Table>(count, elements, kChunk, fill, [&](const Table& table, int blocks) {
          return launch(update<W, G, M>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, table, scale,
                        *by);
        });
      });
    });
  });
}

extern "C" int share4v_sum_of_squares_cuda(int type, int count, const void* const* tensors, const int64_t* elements,
                                           float* partial, int64_t chunks, float* to, void* stream) {
  const auto fill = [&](Sources& table, int place, int i) { table.tensors[place] = tensors[i]; };
  int status = with_type(type, [&](auto zero) {
    using T = decltype(zero);
    float* next = partial;
    return in_tables<Sources>(count, elements, kSquaresChunk, fill, [&](const Sources& table, int blocks) {
      const int done =
          launch(sum_chunk<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, table, next);
      next += blocks;
      return done;
    });
  });
  if (!status) status = launch(sum_partials, dim3(1), dim3(kSumThreads), 0, stream, partial, chunks, to);
  return status;
}
