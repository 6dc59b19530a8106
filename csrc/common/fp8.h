// FP8 formats (Micikevicius et al. 2022) and rounding to them, for every compiler of the kernels. Codes are bytes.
#pragma once

#include "types.h"

// 4 exponent bits, 3 mantissa bits: no infinities, maximum 448. Weights and activations.
struct E4M3 {
  static constexpr int kMantissa = 3, kBias = 7;
  static constexpr float kLargest = 448.0f, kLeastNormal = 0.015625f;
};

// 5 exponent bits, 2 mantissa bits: maximum 57344. Gradients.
struct E5M2 {
  static constexpr int kMantissa = 2, kBias = 15;
  static constexpr float kLargest = 57344.0f, kLeastNormal = 6.103515625e-5f;
};

// Rounds to nearest, ties to even; saturates at the maximum; non-finite values become NaN (0x7f in both formats).
// Branch-free, so that loops vectorize.
template <class F>
SHARE4V_INLINE uint8_t fp8_code(float value) {
  constexpr int kDropped = 23 - F::kMantissa;
  // Power of two whose ulp equals that of a subnormal number of the format.
  constexpr float kAlign = F::kLeastNormal * static_cast<float>(1 << kDropped);
  uint32_t bits, kept, aligned, align;
  std::memcpy(&bits, &value, 4);
  const uint32_t magnitude = bits & 0x7fffffffu;
  float size;
  std::memcpy(&size, &magnitude, 4);
  size = size < F::kLargest ? size : F::kLargest;
  std::memcpy(&kept, &size, 4);
  const uint32_t normal = ((kept + (1u << (kDropped - 1)) - 1u + ((kept >> kDropped) & 1u)) >> kDropped) -
                          ((127u - F::kBias) << F::kMantissa);
  const float sum = size + kAlign, of_align = kAlign;
  std::memcpy(&aligned, &sum, 4);
  std::memcpy(&align, &of_align, 4);
  const uint32_t finite = size < F::kLeastNormal ? aligned - align : normal;
  return static_cast<uint8_t>((magnitude < 0x7f800000u ? finite : 0x7fu) | ((bits >> 24) & 0x80u));
}
