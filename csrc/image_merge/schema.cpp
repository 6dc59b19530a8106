// Write of image features into token embeddings by slot. T tokens, M features, H width; any element type. Included by
// binding.cpp.

// tokens [T], features [M] (rows of `bytes`), slots [M] -> merged [T], source [T]: the feature of each row, -1 for the
// token itself
SHARE4V_KERNEL(share4v_image_merge_forward, const void* tokens, const void* features, const int64_t* slots,
               void* merged, int32_t* source, int64_t num_tokens, int64_t num_features, int64_t bytes);
// grad [T] -> grad_tokens [T] (null: not needed), grad_features [M] (null: not needed)
SHARE4V_KERNEL(share4v_image_merge_backward, const void* grad, const int64_t* slots, const int32_t* source,
               void* grad_tokens, void* grad_features, int64_t num_tokens, int64_t num_features, int64_t bytes);

namespace {

void merge_check_slots(const Tensor& slots, const Tensor& rows, const char* name) {
  STD_TORCH_CHECK(
      rows.dim() == 2 && slots.dim() == 1 && slots.scalar_type() == ScalarType::Long && slots.device() == rows.device(),
      "image_merge takes ", name, " [rows, width] and int64 slots [M] on one device, got ", describe(rows), " and ",
      describe(slots));
  STD_TORCH_CHECK(rows.size(0) < INT32_MAX && slots.size(0) < INT32_MAX, "image_merge takes fewer than 2^31 rows, got ",
                  describe(rows));
}

std::tuple<Tensor, Tensor> image_merge(const Tensor& tokens_, const Tensor& features_, const Tensor& slots_) {
  merge_check_slots(slots_, tokens_, "tokens");
  const std::array<int64_t, 2> shape{slots_.size(0), tokens_.size(1)};
  check_like(features_, "features", tokens_, {shape.data(), 2});
  const Tensor tokens = packed(tokens_), features = packed(features_), slots = packed(slots_);
  Tensor merged = empty_as(tokens), source = empty(tokens, {tokens.size(0)}, ScalarType::Int);
  SHARE4V_RUN(share4v_image_merge_forward, tokens, tokens.data_ptr(), features.data_ptr(),
              static_cast<const int64_t*>(slots.data_ptr()), merged.data_ptr(),
              static_cast<int32_t*>(source.data_ptr()), tokens.size(0), slots.size(0),
              tokens.size(1) * static_cast<int64_t>(tokens.element_size()));
  return {merged, source};
}

std::tuple<Tensor, Tensor> image_merge_backward(const Tensor& grad_, const Tensor& slots_, const Tensor& source_,
                                                bool for_tokens, bool for_features) {
  merge_check_slots(slots_, grad_, "grad");
  STD_TORCH_CHECK(source_.scalar_type() == ScalarType::Int && source_.dim() == 1 && source_.size(0) == grad_.size(0) &&
                      source_.device() == grad_.device(),
                  "source is ", describe(source_), ", which does not fit ", describe(grad_));
  const Tensor grad = packed(grad_), slots = packed(slots_), source = packed(source_);
  const int64_t num_tokens = grad.size(0), num_features = slots.size(0), width = grad.size(1);
  Tensor grad_tokens = empty(grad, {for_tokens ? num_tokens : 0, width}, grad.scalar_type());
  Tensor grad_features = empty(grad, {for_features ? num_features : 0, width}, grad.scalar_type());
  SHARE4V_RUN(share4v_image_merge_backward, grad, grad.data_ptr(), static_cast<const int64_t*>(slots.data_ptr()),
              static_cast<const int32_t*>(source.data_ptr()), for_tokens ? grad_tokens.data_ptr() : nullptr,
              for_features ? grad_features.data_ptr() : nullptr, num_tokens, num_features,
              width * static_cast<int64_t>(grad.element_size()));
  return {grad_tokens, grad_features};
}

}  // namespace

SHARE4V_OP(image_merge, "(Tensor tokens, Tensor features, Tensor slots) -> (Tensor, Tensor)")
SHARE4V_OP(image_merge_backward,
           "(Tensor grad, Tensor slots, Tensor source, bool for_tokens, bool for_features) -> (Tensor, Tensor)")
