// AdamW update of one element, and stochastic rounding to bf16 with random bits that depend only on (key, element): no
// state, the same on every device and for any launch.
#pragma once

#include <cmath>

#include "../common/types.h"

// Elements per partial sum of squares.
constexpr int64_t kSquaresChunk = 1 << 16;

// 32 pseudo-random bits: the finalizer of MurmurHash3 (Appleby), twice, with half of the key before each.
SHARE4V_INLINE uint32_t random_bits(uint32_t element, uint32_t key, uint32_t other_key) {
  uint32_t bits = element ^ key;
  bits = (bits ^ (bits >> 16)) * 0x85ebca6bu;
  bits = (bits ^ (bits >> 13)) * 0xc2b2ae35u;
  bits = (bits ^ (bits >> 16)) + other_key;
  bits = (bits ^ (bits >> 16)) * 0x85ebca6bu;
  bits = (bits ^ (bits >> 13)) * 0xc2b2ae35u;
  return bits ^ (bits >> 16);
}

// Rounds up with the probability of the truncated fraction, so that the mean of many roundings is the value. `noise` is
// below 2^16. Infinity and NaN are unchanged.
template <class T>
SHARE4V_INLINE T rounded(float value, uint32_t noise);
template <>
SHARE4V_INLINE float rounded<float>(float value, uint32_t) {
  return value;
}
template <>
SHARE4V_INLINE bf16 rounded<bf16>(float value, uint32_t noise) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  // Exponent all ones: infinity or NaN.
  bits = (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + noise) & 0xffff0000u;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return from_float<bf16>(wide);
}

// On a GPU without the slow path for tiny and huge divisors, whose call costs registers; to 2 ulp.
SHARE4V_INLINE float divided(float value, float by) {
#ifdef __CUDA_ARCH__
  return __fdividef(value, by);
#else
  return value / by;
#endif
}

// Constants of one step, computed on the host in fp64. Loshchilov & Hutter 2019, as in torch's AdamW.
struct Update {
  float beta2, keep1, keep2;  // keep: 1 - beta, rounded from fp64
  float decay;                // 1 - learning rate * weight decay
  float rate;                 // learning rate / (1 - beta1^step)
  float root;                 // 1 / sqrt(1 - beta2^step)
  float eps;
  int stochastic;
};

template <class W, class M>
SHARE4V_INLINE void update_element(W& weight, M& mean, M& square, float grad, const Update& by, bool stochastic,
                                   uint32_t noise) {
  const float before = to_float(mean), first = before + by.keep1 * (grad - before);
  const float second = by.beta2 * to_float(square) + by.keep2 * grad * grad;
  const float moved = to_float(weight) * by.decay - divided(by.rate * first, sqrtf(second) * by.root + by.eps);
  mean = from_float<M>(first);
  // In bf16, 1 - beta2 = 0.001 of the old value is below half an ulp: rounded to nearest, the moment would never
  // decrease.
  square = stochastic ? rounded<M>(second, noise & 0xffffu) : from_float<M>(second);
  weight = stochastic ? rounded<W>(moved, noise >> 16) : from_float<W>(moved);
}
