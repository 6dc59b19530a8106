// e^x for cpu.cpp files. Branch-free, unlike std::exp, so that loops vectorize.
#pragma once

#include "types.h"

// For x up to slightly above 0, to 2 ulp: Cody-Waite reduction by ln 2 and the polynomial of Moshier's Cephes library.
// Clamped at e^-87 below -87; NaN stays NaN. No upper bound: with one, g++ 12 makes loops three times slower.
SHARE4V_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer, in the last bits.
  const float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return (series * rest * rest + rest + 1.0f) * power;
}
