// RMSNorm, residual + RMSNorm, LayerNorm. Rows of `width` elements; `mean` and `rstd` are fp32, one per row. Included
// by binding.cpp.

// x, residual (null: none), weight, bias (null: RMSNorm) -> sum (null without residual), y, mean (null for RMSNorm),
// rstd
SHARE4V_KERNEL(share4v_norm_forward, int type, const void* x, const void* residual, const void* weight,
               const void* bias, void* sum, void* y, float* mean, float* rstd, int64_t rows, int64_t width, float eps);
// grad, grad_sum (null: none), x, weight, mean (null for RMSNorm), rstd -> grad_x, grad_weight, grad_bias (null for
// RMSNorm); partial: fp32 [chunks, width], for LayerNorm [chunks, 2, width]
SHARE4V_KERNEL(share4v_norm_backward, int type, const void* grad, const void* grad_sum, const void* x,
               const void* weight, const float* mean, const float* rstd, void* grad_x, void* grad_weight,
               void* grad_bias, float* partial, int64_t chunks, int64_t rows, int64_t width);

namespace {

// Number of row chunks for the weight gradient. On the CPU independent of the number of threads, so that the result is
// too.
int64_t norm_chunks(const Tensor& x, int64_t rows) {
  if (!x.is_cpu()) return std::max<int64_t>(1, std::min<int64_t>(rows, 264));
  return std::max<int64_t>(1, std::min<int64_t>(rows / 16, 32));
}

void norm_check(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "a norm needs rows of at least one element, got ", describe(x));
  const int64_t width = x.size(-1);
  check_like(weight, "weight", x, {&width, 1});
}

int64_t norm_rows(const Tensor& x) { return x.numel() / x.size(-1); }

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_, const Tensor& weight_, double eps) {
  norm_check(x_, weight_);
  const Tensor x = packed(x_), weight = packed(weight_);
  const int64_t rows = norm_rows(x);
  Tensor y = empty_as(x), rstd = empty(x, {rows}, ScalarType::Float);
  SHARE4V_RUN(share4v_norm_forward, x, type_of(x), x.data_ptr(), nullptr, weight.data_ptr(), nullptr, nullptr,
              y.data_ptr(), nullptr, static_cast<float*>(rstd.data_ptr()), rows, x.size(-1), static_cast<float>(eps));
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x_, const Tensor& residual_, const Tensor& weight_,
                                                double eps) {
  norm_check(x_, weight_);
  check_like(residual_, "residual", x_, x_.sizes());
  const Tensor x = packed(x_), residual = packed(residual_), weight = packed(weight_);
  const int64_t rows = norm_rows(x);
  Tensor y = empty_as(x), sum = empty_as(x), rstd = empty(x, {rows}, ScalarType::Float);
  SHARE4V_RUN(share4v_norm_forward, x, type_of(x), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), nullptr,
              sum.data_ptr(), y.data_ptr(), nullptr, static_cast<float*>(rstd.data_ptr()), rows, x.size(-1),
              static_cast<float>(eps));
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_, const std::optional<Tensor>& grad_sum_,
                                             const Tensor& x_, const Tensor& weight_, const Tensor& rstd_) {
  norm_check(x_, weight_);
  check_like(grad_, "grad", x_, x_.sizes());
  if (grad_sum_) check_like(*grad_sum_, "grad_sum", x_, x_.sizes());
  const Tensor grad = packed(grad_), x = packed(x_), weight = packed(weight_), rstd = packed(rstd_);
  const Tensor grad_sum = grad_sum_ ? packed(*grad_sum_) : Tensor();
  const int64_t rows = norm_rows(x), width = x.size(-1), chunks = norm_chunks(x, rows);
  Tensor grad_x = empty_as(x), grad_weight = empty_as(weight), partial = empty(x, {chunks, width}, ScalarType::Float);
  SHARE4V_RUN(share4v_norm_backward, x, type_of(x), grad.data_ptr(), grad_sum_ ? grad_sum.data_ptr() : nullptr,
              x.data_ptr(), weight.data_ptr(), nullptr, static_cast<const float*>(rstd.data_ptr()), grad_x.data_ptr(),
              grad_weight.data_ptr(), nullptr, static_cast<float*>(partial.data_ptr()), chunks, rows, width);
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                                              double eps) {
  norm_check(x_, weight_);
  norm_check(x_, bias_);
  const Tensor x = packed(x_), weight = packed(weight_), bias = packed(bias_);
  const int64_t rows = norm_rows(x);
  Tensor y = empty_as(x), mean = empty(x, {rows}, ScalarType::Float), rstd = empty(x, {rows}, ScalarType::Float);
  SHARE4V_RUN(share4v_norm_forward, x, type_of(x), x.data_ptr(), nullptr, weight.data_ptr(), bias.data_ptr(), nullptr,
              y.data_ptr(), static_cast<float*>(mean.data_ptr()), static_cast<float*>(rstd.data_ptr()), rows,
              x.size(-1), static_cast<float>(eps));
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                                                       const Tensor& mean_, const Tensor& rstd_) {
  norm_check(x_, weight_);
  check_like(grad_, "grad", x_, x_.sizes());
  const Tensor grad = packed(grad_), x = packed(x_), weight = packed(weight_), mean = packed(mean_),
               rstd = packed(rstd_);
  const int64_t rows = norm_rows(x), width = x.size(-1), chunks = norm_chunks(x, rows);
  Tensor grad_x = empty_as(x), grad_weight = empty_as(weight), grad_bias = empty_as(weight),
         partial = empty(x, {chunks, 2, width}, ScalarType::Float);
  SHARE4V_RUN(share4v_norm_backward, x, type_of(x), grad.data_ptr(), nullptr, x.data_ptr(), weight.data_ptr(),
              static_cast<const float*>(mean.data_ptr()), static_cast<const float*>(rstd.data_ptr()), grad_x.data_ptr(),
              grad_weight.data_ptr(), grad_bias.data_ptr(), static_cast<float*>(partial.data_ptr()), chunks, rows,
              width);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

SHARE4V_OP(rms_norm, "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
SHARE4V_OP(add_rms_norm, "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
SHARE4V_OP(rms_norm_backward,
           "(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)")
SHARE4V_OP(layer_norm, "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)")
SHARE4V_OP(layer_norm_backward,
           "(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)")
