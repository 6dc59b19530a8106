// CPU image merge: every output row is written once, from its source row.
#include "../common/host.h"

namespace {

// Maps tokens to features; returns false when a slot is out of range. Of several features with one slot, the last one
// is kept.
bool map_slots(const int64_t* slots, int32_t* source, int64_t num_tokens, int64_t num_features) {
  std::fill(source, source + num_tokens, -1);
  for (int64_t i = 0; i < num_features; ++i) {
    if (slots[i] < 0 || slots[i] >= num_tokens) return false;
    source[slots[i]] = static_cast<int32_t>(i);
  }
  return true;
}

}  // namespace

extern "C" int share4v_image_merge_forward_cpu(const void* tokens, const void* features, const int64_t* slots,
                                               void* merged, int32_t* source, int64_t num_tokens, int64_t num_features,
                                               int64_t bytes, void*) {
  if (!map_slots(slots, source, num_tokens, num_features)) return kIndexOutOfRange;
  const char *from_tokens = static_cast<const char*>(tokens), *from_features = static_cast<const char*>(features);
  char* to = static_cast<char*>(merged);
  parallel_rows(num_tokens, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      // Consecutive rows (the text between two images, an image) are copied at once.
      const int32_t origin = source[row];
      int64_t last = row + 1;
      while (last < end && source[last] == (origin < 0 ? -1 : origin + static_cast<int32_t>(last - row))) ++last;
      const char* from = origin < 0 ? from_tokens + row * bytes : from_features + origin * bytes;
      std::memcpy(to + row * bytes, from, static_cast<size_t>((last - row) * bytes));
      row = last;
    }
  });
  return kDone;
}

extern "C" int share4v_image_merge_backward_cpu(const void* grad, const int64_t* slots, const int32_t* source,
                                                void* grad_tokens, void* grad_features, int64_t num_tokens,
                                                int64_t num_features, int64_t bytes, void*) {
  const char* from = static_cast<const char*>(grad);
  const size_t size = static_cast<size_t>(bytes);
  if (char* to = static_cast<char*>(grad_tokens)) {
    parallel_rows(num_tokens, bytes, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (source[row] < 0) {
          std::memcpy(to + row * bytes, from + row * bytes, size);
        } else {
          std::memset(to + row * bytes, 0, size);
        }
      }
    });
  }
  if (char* to = static_cast<char*>(grad_features)) {
    parallel_rows(num_features, bytes, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (source[slots[row]] == row) {
          std::memcpy(to + row * bytes, from + slots[row] * bytes, size);
        } else {
          std::memset(to + row * bytes, 0, size);
        }
      }
    });
  }
  return kDone;
}
