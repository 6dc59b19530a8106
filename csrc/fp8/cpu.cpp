// CPU FP8. Magnitudes are compared as integers, which orders NaN above infinity: a maximum loses neither.
#include "../common/fp8.h"
#include "../common/host.h"

namespace {

constexpr int64_t kTile = 64, kMostChunks = 64;

template <class T>
SHARE4V_CLONES int32_t largest(const T* x, int64_t begin, int64_t end) {
  int32_t peak = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t i = begin; i < end; ++i) {
    const float value = to_float(x[i]);
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    bits &= 0x7fffffff;
    peak = bits > peak ? bits : peak;
  }
  return peak;
}

template <class T, class F>
SHARE4V_CLONES void cast_row(const T* from, uint8_t* to, float inverse, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = fp8_code<F>(to_float(from[i]) * inverse);
}

// words[g][c] = the bytes of column c in rows 8 g to 8 g + 7, the first in the lowest byte: transposing words takes an
// eighth of the moves.
SHARE4V_CLONES void gather(const uint8_t (*tile)[kTile], uint64_t (*words)[kTile]) {
  for (int64_t group = 0; group < kTile / 8; ++group) {
#pragma omp simd
    for (int64_t column = 0; column < kTile; ++column) {
      uint64_t word = 0;
      for (int64_t row = 0; row < 8; ++row) word |= static_cast<uint64_t>(tile[8 * group + row][column]) << (8 * row);
      words[group][column] = word;
    }
  }
}

// Casts bands of kTile rows tile by tile; a tile is transposed while it is in the L1 cache.
template <class T, class F>
void bands(const T* x, uint8_t* codes, uint8_t* transposed, float inverse, int64_t begin, int64_t end, int64_t rows,
           int64_t columns, int64_t padded) {
  uint8_t tile[kTile][kTile] = {};
  uint64_t words[kTile / 8][kTile];
  for (int64_t top = begin * kTile; top < std::min(end * kTile, padded); top += kTile) {
    const int64_t height = std::min(kTile, padded - top);
    for (int64_t left = 0; left < columns; left += kTile) {
      const int64_t width = std::min(kTile, columns - left);
      for (int64_t row = 0; row < height; ++row) {
        if (top + row < rows) {
          cast_row<T, F>(x + (top + row) * columns + left, tile[row], inverse, width);
          if (codes) std::memcpy(codes + (top + row) * columns + left, tile[row], static_cast<size_t>(width));
        } else {
          std::memset(tile[row], 0, kTile);
        }
      }
      gather(tile, words);
      for (int64_t column = 0; column < width; ++column) {
        uint8_t* to = transposed + (left + column) * padded + top;
        for (int64_t group = 0; group < height / 8; ++group) std::memcpy(to + 8 * group, &words[group][column], 8);
      }
    }
  }
}

template <class T, class F>
void cast(const T* x, uint8_t* codes, uint8_t* transposed, float inverse, int64_t rows, int64_t columns,
          int64_t padded) {
  if (!transposed) {
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) {
      cast_row<T, F>(x + begin * columns, codes + begin * columns, inverse, (end - begin) * columns);
    });
    return;
  }
  parallel_rows((padded + kTile - 1) / kTile, kTile * columns, [&](int64_t begin, int64_t end) {
    bands<T, F>(x, codes, transposed, inverse, begin, end, rows, columns, padded);
  });
}

}  // namespace

extern "C" int share4v_fp8_scale_cpu(int type, bool e5m2, const void* x, float* scale, uint32_t*, int64_t count,
                                     float least, void*) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    int32_t peaks[kMostChunks] = {};
    const int64_t chunks = std::min<int64_t>(kMostChunks, count / 4096 + 1);
    parallel_rows(chunks, count / chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        peaks[chunk] = largest(static_cast<const T*>(x), count * chunk / chunks, count * (chunk + 1) / chunks);
      }
    });
    const int32_t bits = *std::max_element(peaks, peaks + chunks);
    float peak;
    std::memcpy(&peak, &bits, 4);
    *scale = (peak < least ? least : peak) / (e5m2 ? E5M2::kLargest : E4M3::kLargest);
    return static_cast<int>(kDone);
  });
}

extern "C" int share4v_fp8_cast_cpu(int type, bool e5m2, const void* x, const float* scale, uint8_t* codes,
                                    uint8_t* transposed, int64_t rows, int64_t columns, int64_t padded, void*) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto cast_to = e5m2 ? cast<T, E5M2> : cast<T, E4M3>;
    cast_to(static_cast<const T*>(x), codes, transposed, 1.0f / *scale, rows, columns, padded);
    return static_cast<int>(kDone);
  });
}
