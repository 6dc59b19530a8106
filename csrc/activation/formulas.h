// Activations and their derivatives for one element in fp32. M provides `exponential` and `reciprocal`, the fastest of
// each compiler.
#pragma once

#include "../common/types.h"

// Activation kind, shared by schema and kernels; kSwiglu takes two inputs, the others one.
enum Activation : int { kGelu = 0, kQuickGelu = 1, kSwiglu = 2, kGeluTanh = 3 };

// Normal CDF at x, given exp(-x^2 / 2). For negative x the product of that and exp(x^2 / 2) * erfc(-x / sqrt 2) / 2,
// which keeps its relative accuracy where 1 + erf cancels; the second factor is a polynomial in 1 / (1 + 0.3 |x|),
// fitted on [0, 14] to 1.5e-7 relative.
template <class M>
SHARE4V_INLINE float normal_below(float x, float bell) {
  const float t = M::reciprocal(1.0f + 0.3f * (x < 0.0f ? -x : x));
  float series = 0.035676304f;
  series = series * t - 0.15720926f;
  series = series * t + 0.20636384f;
  series = series * t - 0.053692896f;
  series = series * t + 0.12856640f;
  series = series * t + 0.099912077f;
  series = series * t + 0.12075417f;
  series = series * t + 0.11962929f;
  const float tail = series * t * bell;
  return x < 0.0f ? tail : 1.0f - tail;
}

struct Value {
  float value, slope;
};

// gelu(x) = x * P(N < x); quick gelu(x) = x * sigmoid(1.702 x); tanh gelu(x) = x * (1 + tanh(u)) / 2 with u = sqrt(2 /
// pi) * (x + 0.044715 x^3), which is x * sigmoid(2 u) (all Hendrycks & Gimpel 2016); for kSwiglu silu(x) = x *
// sigmoid(x), the gate.
template <int kKind, class M>
SHARE4V_INLINE Value activate(float x) {
  if (kKind == kGelu) {
    const float bell = M::exponential(-0.5f * x * x), below = normal_below<M>(x, bell);
    return {x * below, below + x * bell * 0.39894228f};
  }
  // The sigmoid's argument at |x|, divided by |x|, and its derivative. 2 * sqrt(2 / pi) = 1.5957691.
  const float slant = kKind == kQuickGelu  ? 1.702f
                      : kKind == kGeluTanh ? 1.5957691f + 0.071354816f * x * x
                                           : 1.0f,
              steepness = kKind == kGeluTanh ? 1.5957691f + 0.21406445f * x * x : slant;
  // Of -|x|, so that the exponential does not overflow.
  const float down = M::exponential(-slant * (x < 0.0f ? -x : x)),
              sigmoid = (x < 0.0f ? down : 1.0f) * M::reciprocal(1.0f + down);
  return {x * sigmoid, sigmoid * (1.0f + steepness * x * (1.0f - sigmoid))};
}
