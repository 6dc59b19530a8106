// CPU patchify: one table lookup per value, written in order; the strip of pixels that is read stays in the L1 cache.
#include "../common/host.h"

namespace {

// Strips of `patch` rows of pixels, [begin, end) of all images; `down` strips of an image of height x width pixels.
template <class T>
void strips(const uint8_t* pixels, const T* table, T* patches, int64_t begin, int64_t end, int64_t height,
            int64_t width, int64_t patch) {
  const int64_t down = height / patch, covered = width / patch * patch;
  for (int64_t strip = begin; strip < end; ++strip) {
    const uint8_t* from = pixels + (strip / down * height + strip % down * patch) * width * 3;
    T* to = patches + strip * patch * covered * 3;
    for (int64_t left = 0; left < covered; left += patch) {
      for (int64_t channel = 0; channel < 3; ++channel) {
        const T* values = table + channel * 256;
        for (int64_t row = 0; row < patch; ++row) {
          const uint8_t* at = from + (row * width + left) * 3 + channel;
          for (int64_t column = 0; column < patch; ++column) *to++ = values[at[3 * column]];
        }
      }
    }
  }
}

}  // namespace

extern "C" int share4v_patchify_cpu(int type, const uint8_t* pixels, const void* table, void* patches, int64_t images,
                                    int64_t height, int64_t width, int64_t patch, void*) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    parallel_rows(images * (height / patch), patch * width * 3, [&](int64_t begin, int64_t end) {
      strips(pixels, static_cast<const T*>(table), static_cast<T*>(patches), begin, end, height, width, patch);
    });
    return static_cast<int>(kDone);
  });
}
