// Cross-entropy of a block of logits [rows, width]: columns `first` to `first + width` of `vocabulary` real ones;
// columns beyond are padding. torch computes the products with hidden states and weights. Statistics are fp32, one per
// row. Included by binding.cpp.

// logits, targets -> maximum, total (sum of exp(logit - maximum)), target (logit of the target), accumulated over
// blocks
SHARE4V_KERNEL(share4v_cross_entropy_statistics, int type, const void* logits, const int64_t* targets, float* maximum,
               float* total, float* target, int64_t rows, int64_t width, int64_t first, int64_t vocabulary);
// logits -> (exp(logit - normaliser) - [column is the target]) * scale, in place; padding -> 0
SHARE4V_KERNEL(share4v_cross_entropy_gradient, int type, void* logits, const int64_t* targets, const float* normaliser,
               const float* scale, int64_t rows, int64_t width, int64_t first, int64_t vocabulary);

namespace {

void cross_entropy_check(const Tensor& logits, const Tensor& targets, int64_t first) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && first >= 0,
                  "cross-entropy takes contiguous logits [rows, columns], got ", describe(logits), " from column ",
                  first);
  STD_TORCH_CHECK(
      targets.dim() == 1 && targets.size(0) == logits.size(0) && targets.scalar_type() == ScalarType::Long &&
          targets.device() == logits.device() && targets.is_contiguous(),
      "targets are ", describe(targets), ", expected contiguous int64, one for each row of ", describe(logits));
}

float* cross_entropy_row_values(const Tensor& values, const char* name, const Tensor& logits, int64_t count) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.numel() == count && values.is_contiguous() &&
                      values.device() == logits.device(),
                  name, " is ", describe(values), ", expected ", count, " contiguous float32 beside ",
                  describe(logits));
  return static_cast<float*>(values.data_ptr());
}

void cross_entropy_statistics(const Tensor& logits, const Tensor& targets, int64_t first, int64_t vocabulary,
                              Tensor maximum, Tensor total, Tensor target) {
  cross_entropy_check(logits, targets, first);
  const int64_t rows = logits.size(0);
  SHARE4V_RUN(share4v_cross_entropy_statistics, logits, type_of(logits), logits.data_ptr(),
              static_cast<const int64_t*>(targets.data_ptr()),
              cross_entropy_row_values(maximum, "maximum", logits, rows),
              cross_entropy_row_values(total, "total", logits, rows),
              cross_entropy_row_values(target, "target", logits, rows), rows, logits.size(1), first, vocabulary);
}

void cross_entropy_gradient(Tensor logits, const Tensor& targets, const Tensor& normaliser, const Tensor& scale,
                            int64_t first, int64_t vocabulary) {
  cross_entropy_check(logits, targets, first);
  const int64_t rows = logits.size(0);
  SHARE4V_RUN(share4v_cross_entropy_gradient, logits, type_of(logits), logits.data_ptr(),
              static_cast<const int64_t*>(targets.data_ptr()),
              cross_entropy_row_values(normaliser, "normaliser", logits, rows),
              cross_entropy_row_values(scale, "scale", logits, 1), rows, logits.size(1), first, vocabulary);
}

}  // namespace

SHARE4V_OP(cross_entropy_statistics,
           "(Tensor logits, Tensor targets, int first, int vocabulary, Tensor(a!) maximum, Tensor(b!) total, "
           "Tensor(c!) target) -> ()")
SHARE4V_OP(cross_entropy_gradient,
           "(Tensor(a!) logits, Tensor targets, Tensor normaliser, Tensor scale, int first, int vocabulary) -> ()")
