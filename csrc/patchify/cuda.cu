// CUDA patchify: the table in shared memory, 16 bytes of one image's output per thread; pixels are read through the L1
// cache.
#include "../common/device.cuh"

namespace {

constexpr int kThreads = 256, kValues = 3 * 256;

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    forward(const uint8_t* __restrict__ pixels, const T* __restrict__ table, T* __restrict__ patches, int64_t images,
            int height, int width, int patch) {
  __shared__ T values[kValues];
  for (int i = threadIdx.x; i < kValues; i += blockDim.x) values[i] = table[i];
  __syncthreads();
  const unsigned area = patch * patch, across = width / patch, covered = across * patch;
  const unsigned size = height / patch * across * 3 * area;  // of one image's output
  const unsigned first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (first >= size) return;
  const unsigned number = first / (3 * area), within = first % (3 * area);
  for (int64_t image = blockIdx.y; image < images; image += gridDim.y) {
    unsigned channel = within / area, row = within % area / patch, column = within % patch;
    unsigned down = number / across * patch, right = number % across * patch;
    const uint8_t* const from = pixels + image * height * width * 3;
    Vector<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      out.at[k] = values[channel * 256 + from[((down + row) * width + right + column) * 3 + channel]];
      // The next element; at the end of a patch, the next patch.
      if (++column == patch) {
        column = 0;
        if (++row == patch) {
          row = 0;
          if (++channel == 3) {
            channel = 0;
            right += patch;
            if (right == covered) {
              right = 0;
              down += patch;
            }
          }
        }
      }
    }
    store<T, V>(patches + image * size + first, out);
  }
}

}  // namespace

extern "C" int share4v_patchify_cuda(int type, const uint8_t* pixels, const void* table, void* patches, int64_t images,
                                     int64_t height, int64_t width, int64_t patch, void* stream) {
  const int64_t size = height / patch * (width / patch) * 3 * patch * patch;
  if (images == 0 || size == 0) return kDone;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_vector<T>(can_vectorize<T>(size, patches), [&](auto length) {
      constexpr int V = decltype(length)::value;
      const int64_t vectors = size / V;
      const dim3 grid(static_cast<unsigned>((vectors + kThreads - 1) / kThreads),
                      static_cast<unsigned>(images < 65535 ? images : 65535));
      return launch(forward<T, V>, grid, dim3(kThreads), 0, stream, pixels, static_cast<const T*>(table),
                    static_cast<T*>(patches), images, static_cast<int>(height), static_cast<int>(width),
                    static_cast<int>(patch));
    });
  });
}
