// CUDA image merge: a map of the feature of each row, then every output row is written once, one block per row. No host
// sync.
#include "../common/device.cuh"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    map_slots(const int64_t* __restrict__ slots, int32_t* source, int64_t num_tokens, int64_t num_features) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= num_features) return;
  if (slots[i] < 0 || slots[i] >= num_tokens) __trap();
  // Of several features with one slot, the last one is kept.
  atomicMax(source + slots[i], static_cast<int32_t>(i));
}

// U: type of one access.
template <class U>
__device__ __forceinline__ void copy_row(U* to, const U* from, int64_t units) {
  for (int64_t i = threadIdx.x; i < units; i += blockDim.x) to[i] = from[i];
}

template <class U>
__device__ __forceinline__ void clear_row(U* to, int64_t units) {
  for (int64_t i = threadIdx.x; i < units; i += blockDim.x) to[i] = U{};
}

template <class U>
__global__ void __launch_bounds__(kThreads)
    forward(const U* __restrict__ tokens, const U* __restrict__ features, const int32_t* __restrict__ source,
            U* __restrict__ merged, int64_t units) {
  const int64_t row = blockIdx.x;
  const int64_t origin = source[row];
  copy_row(merged + row * units, origin < 0 ? tokens + row * units : features + origin * units, units);
}

// The first `token_blocks` blocks write rows of grad_tokens, the others rows of grad_features.
template <class U>
__global__ void __launch_bounds__(kThreads)
    backward(const U* __restrict__ grad, const int64_t* __restrict__ slots, const int32_t* __restrict__ source,
             U* __restrict__ grad_tokens, U* __restrict__ grad_features, int64_t token_blocks, int64_t units) {
  if (blockIdx.x < token_blocks) {
    const int64_t row = blockIdx.x;
    if (source[row] < 0) {
      copy_row(grad_tokens + row * units, grad + row * units, units);
    } else {
      clear_row(grad_tokens + row * units, units);
    }
    return;
  }
  const int64_t feature = blockIdx.x - token_blocks, row = slots[feature];
  if (source[row] == feature) {
    copy_row(grad_features + feature * units, grad + row * units, units);
  } else {
    clear_row(grad_features + feature * units, units);
  }
}

// Calls `body` with a value of the widest type that divides rows and addresses.
template <class Body, class... Pointers>
int with_unit(int64_t bytes, Body body, const Pointers*... pointers) {
  const auto fits = [&](size_t size) {
    return bytes % size == 0 && ((reinterpret_cast<uintptr_t>(pointers) % size == 0) && ...);
  };
  if (fits(16)) return body(uint4{});
  if (fits(4)) return body(uint32_t{});
  if (fits(2)) return body(uint16_t{});
  return body(uint8_t{});
}

}  // namespace

extern "C" int share4v_image_merge_forward_cuda(const void* tokens, const void* features, const int64_t* slots,
                                                void* merged, int32_t* source, int64_t num_tokens, int64_t num_features,
                                                int64_t bytes, void* stream) {
  if (num_tokens == 0 && num_features == 0) return kDone;
  int status =
      static_cast<int>(cudaMemsetAsync(source, 0xff, sizeof(int32_t) * num_tokens, static_cast<cudaStream_t>(stream)));
  if (!status && num_features) {
    status = launch(map_slots, dim3(static_cast<unsigned>((num_features + kThreads - 1) / kThreads)), dim3(kThreads), 0,
                    stream, slots, source, num_tokens, num_features);
  }
  if (status || num_tokens == 0 || bytes == 0) return status;
  return with_unit(
      bytes,
      [&](auto zero) {
        using U = decltype(zero);
        const int64_t units = bytes / static_cast<int64_t>(sizeof(U));
        return launch(forward<U>, dim3(static_cast<unsigned>(num_tokens)), dim3(threads_for(units, kThreads)), 0,
                      stream, static_cast<const U*>(tokens), static_cast<const U*>(features), source,
                      static_cast<U*>(merged), units);
      },
      tokens, features, merged);
}

extern "C" int share4v_image_merge_backward_cuda(const void* grad, const int64_t* slots, const int32_t* source,
                                                 void* grad_tokens, void* grad_features, int64_t num_tokens,
                                                 int64_t num_features, int64_t bytes, void* stream) {
  const int64_t token_blocks = grad_tokens ? num_tokens : 0, blocks = token_blocks + (grad_features ? num_features : 0);
  if (blocks == 0 || bytes == 0) return kDone;
  return with_unit(
      bytes,
      [&](auto zero) {
        using U = decltype(zero);
        const int64_t units = bytes / static_cast<int64_t>(sizeof(U));
        return launch(backward<U>, dim3(static_cast<unsigned>(blocks)), dim3(threads_for(units, kThreads)), 0, stream,
                      static_cast<const U*>(grad), slots, source, static_cast<U*>(grad_tokens),
                      static_cast<U*>(grad_features), token_blocks, units);
      },
      grad, grad_tokens, grad_features);
}
