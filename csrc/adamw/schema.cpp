// AdamW over many tensors, and the sum of squares of many tensors. Included by binding.cpp.

#include "update.h"

// For each of `count` tensors: weights, grads, moments, number of elements, and the two halves of the random key.
// `types`: element types of weights, gradients, moments. scale: factor of the gradients, one fp32 on the device (null:
// 1).
SHARE4V_KERNEL(share4v_adamw, const int* types, int count, void* const* weights, const void* const* grads,
               void* const* means, void* const* squares, const int64_t* elements, const uint32_t* keys,
               const float* scale, const Update* update);
// to: the sum, one fp32 on the device; partial: fp32, one for each chunk of kSquaresChunk elements of each tensor
SHARE4V_KERNEL(share4v_sum_of_squares, int type, int count, const void* const* tensors, const int64_t* elements,
               float* partial, int64_t chunks, float* to);

namespace {

using Tensors = std::vector<Tensor>;

void adamw_check(const Tensors& tensors, const char* name, const Tensors& weights) {
  STD_TORCH_CHECK(tensors.size() == weights.size(), "adamw got ", weights.size(), " weights and ", tensors.size(), " ",
                  name);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &tensor = tensors[i], &weight = weights[i];
    bool same = tensor.is_contiguous() && tensor.device() == weight.device() && tensor.dim() == weight.dim() &&
                type_of(tensor) == type_of(tensors[0]);
    for (int64_t k = 0; same && k < weight.dim(); ++k) same = tensor.size(k) == weight.size(k);
    STD_TORCH_CHECK(same, "adamw: number ", i, " of ", name, " is ", describe(tensor), ", its weight ",
                    describe(weight), "; one shape and device for both, one element type for all ", name,
                    ", contiguous");
  }
}

template <class Pointer>
std::vector<Pointer> adamw_pointers(const Tensors& tensors) {
  std::vector<Pointer> pointers;
  for (const Tensor& tensor : tensors) pointers.push_back(static_cast<Pointer>(tensor.data_ptr()));
  return pointers;
}

std::vector<int64_t> adamw_elements(const Tensors& tensors) {
  std::vector<int64_t> elements;
  for (const Tensor& tensor : tensors) elements.push_back(tensor.numel());
  return elements;
}

const float* adamw_scale(const std::optional<Tensor>& scale, const Tensor& weight) {
  if (!scale) return nullptr;
  STD_TORCH_CHECK(
      scale->numel() == 1 && scale->scalar_type() == ScalarType::Float && scale->device() == weight.device(),
      "adamw: scale is ", describe(*scale), ", expected one float32 on the device of ", describe(weight));
  return static_cast<const float*>(scale->data_ptr());
}

// `keys`: one number per tensor for its random bits; empty: round to nearest.
void adamw(Tensors weights, const Tensors grads, Tensors means, Tensors squares, const std::optional<Tensor>& scale,
           double rate, double beta1, double beta2, double eps, double decay, int64_t step,
           const std::vector<int64_t> keys) {
  if (weights.empty()) return;
  adamw_check(weights, "weights", weights);
  adamw_check(grads, "gradients", weights);
  adamw_check(means, "averages", weights);
  adamw_check(squares, "averages of squares", weights);
  STD_TORCH_CHECK(type_of(means[0]) == type_of(squares[0]), "adamw: both averages have one element type, got ",
                  describe(means[0]), " and ", describe(squares[0]));
  STD_TORCH_CHECK(step >= 1 && (keys.empty() || keys.size() == weights.size()), "adamw: step ", step, " and ",
                  keys.size(), " keys for ", weights.size(),
                  " tensors; steps count from 1, there is a key for each tensor or none");
  std::vector<uint32_t> halves;
  for (const int64_t key : keys) {
    halves.push_back(static_cast<uint32_t>(key));
    halves.push_back(static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32));
  }
  halves.resize(2 * weights.size());
  const Update update{static_cast<float>(beta2),
                      static_cast<float>(1 - beta1),
                      static_cast<float>(1 - beta2),
                      static_cast<float>(1 - rate * decay),
                      static_cast<float>(rate / (1 - std::pow(beta1, static_cast<double>(step)))),
                      static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))),
                      static_cast<float>(eps),
                      !keys.empty()};
  const int types[3] = {type_of(weights[0]), type_of(grads[0]), type_of(means[0])};
  const float* factor = adamw_scale(scale, weights[0]);
  SHARE4V_RUN(share4v_adamw, weights[0], types, static_cast<int>(weights.size()), adamw_pointers<void*>(weights).data(),
              adamw_pointers<const void*>(grads).data(), adamw_pointers<void*>(means).data(),
              adamw_pointers<void*>(squares).data(), adamw_elements(weights).data(), halves.data(), factor, &update);
}

Tensor sum_of_squares(const Tensors tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "sum_of_squares needs a tensor, to know the device");
  Tensors held;
  int64_t chunks = 0;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.device() == tensors[0].device() && type_of(tensor) == type_of(tensors[0]),
                    "sum_of_squares takes one device and element type, got ", describe(tensors[0]), " and ",
                    describe(tensor));
    held.push_back(packed(tensor));
    chunks += (tensor.numel() + kSquaresChunk - 1) / kSquaresChunk;
  }
  Tensor to = empty(tensors[0], {}, ScalarType::Float), partial = empty(tensors[0], {chunks}, ScalarType::Float);
  SHARE4V_RUN(share4v_sum_of_squares, to, type_of(tensors[0]), static_cast<int>(held.size()),
              adamw_pointers<const void*>(held).data(), adamw_elements(held).data(),
              static_cast<float*>(partial.data_ptr()), chunks, static_cast<float*>(to.data_ptr()));
  return to;
}

}  // namespace

SHARE4V_OP(adamw,
           "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] squares, Tensor? scale, float "
           "rate, float beta1, float beta2, "
           "float eps, float decay, int step, int[] keys) -> ()")
SHARE4V_OP(sum_of_squares, "(Tensor[] tensors) -> Tensor")
