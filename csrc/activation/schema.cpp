// Bias + GELU (erf, tanh or quick), bias + SwiGLU. Rows of `width` results; SwiGLU's input has 2 * width columns,
// gates first. Included by binding.cpp.
#include "formulas.h"

// x, bias (null: none) -> y; `kind` is an Activation
SHARE4V_KERNEL(share4v_activation_forward, int type, int kind, const void* x, const void* bias, void* y, int64_t rows,
               int64_t width);
// grad, x, bias -> grad_x, grad_bias (null without bias); partial: fp32 [chunks, columns of x], null without bias
SHARE4V_KERNEL(share4v_activation_backward, int type, int kind, const void* grad, const void* x, const void* bias,
               void* grad_x, void* grad_bias, float* partial, int64_t chunks, int64_t rows, int64_t width);

namespace {

// Number of row chunks for the bias gradient. On the CPU independent of the number of threads, so that the result is
// too.
int64_t activation_chunks(const Tensor& x, int64_t rows, int64_t width) {
  if (x.is_cpu()) return std::max<int64_t>(1, std::min<int64_t>(rows / 16, 32));
  // Eight blocks of 1024 columns on each of 132 SMs.
  return std::max<int64_t>(1, std::min<int64_t>(rows, 1056 / (width / 1024 + 1)));
}

// Returns the width of the result.
int64_t activation_check(int kind, const Tensor& x, const std::optional<Tensor>& bias) {
  const int64_t parts = kind == kSwiglu ? 2 : 1;
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0 && x.size(-1) % parts == 0,
                  "an activation needs rows of at least one element, SwiGLU as many gates as values, got ",
                  describe(x));
  const int64_t columns = x.size(-1);
  if (bias) check_like(*bias, "bias", x, {&columns, 1});
  return columns / parts;
}

template <int kKind>
Tensor activation(const Tensor& x_, const std::optional<Tensor>& bias_) {
  const int64_t width = activation_check(kKind, x_, bias_);
  const Tensor x = packed(x_), bias = bias_ ? packed(*bias_) : Tensor();
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = width;
  Tensor y = torch::stable::new_empty(x, shape);
  SHARE4V_RUN(share4v_activation_forward, x, type_of(x), kKind, x.data_ptr(), bias_ ? bias.data_ptr() : nullptr,
              y.data_ptr(), x.numel() / x.size(-1), width);
  return y;
}

// The bias gradient is empty without a bias.
template <int kKind>
std::tuple<Tensor, Tensor> activation_backward(const Tensor& grad_, const Tensor& x_,
                                               const std::optional<Tensor>& bias_) {
  const int64_t width = activation_check(kKind, x_, bias_), columns = x_.size(-1), rows = x_.numel() / columns;
  std::vector<int64_t> shape(x_.sizes().begin(), x_.sizes().end());
  shape.back() = width;
  check_like(grad_, "grad", x_, shape);
  const Tensor grad = packed(grad_), x = packed(x_), bias = bias_ ? packed(*bias_) : Tensor();
  const int64_t chunks = activation_chunks(x, rows, width);
  Tensor grad_x = empty_as(x), grad_bias = empty(x, {bias_ ? columns : 0}, x.scalar_type());
  Tensor partial = empty(x, {bias_ ? chunks : 0, columns}, ScalarType::Float);
  SHARE4V_RUN(share4v_activation_backward, x, type_of(x), kKind, grad.data_ptr(), x.data_ptr(),
              bias_ ? bias.data_ptr() : nullptr, grad_x.data_ptr(), bias_ ? grad_bias.data_ptr() : nullptr,
              bias_ ? static_cast<float*>(partial.data_ptr()) : nullptr, chunks, rows, width);
  return {grad_x, grad_bias};
}

Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias) { return activation<kGelu>(x, bias); }
Tensor bias_quick_gelu(const Tensor& x, const std::optional<Tensor>& bias) { return activation<kQuickGelu>(x, bias); }
Tensor bias_gelu_tanh(const Tensor& x, const std::optional<Tensor>& bias) { return activation<kGeluTanh>(x, bias); }
Tensor bias_swiglu(const Tensor& x, const std::optional<Tensor>& bias) { return activation<kSwiglu>(x, bias); }
std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias) {
  return activation_backward<kGelu>(grad, x, bias);
}
std::tuple<Tensor, Tensor> bias_quick_gelu_backward(const Tensor& grad, const Tensor& x,
                                                    const std::optional<Tensor>& bias) {
  return activation_backward<kQuickGelu>(grad, x, bias);
}
std::tuple<Tensor, Tensor> bias_gelu_tanh_backward(const Tensor& grad, const Tensor& x,
                                                   const std::optional<Tensor>& bias) {
  return activation_backward<kGeluTanh>(grad, x, bias);
}
std::tuple<Tensor, Tensor> bias_swiglu_backward(const Tensor& grad, const Tensor& x,
                                                const std::optional<Tensor>& bias) {
  return activation_backward<kSwiglu>(grad, x, bias);
}

}  // namespace

SHARE4V_OP(bias_gelu, "(Tensor x, Tensor? bias) -> Tensor")
SHARE4V_OP(bias_quick_gelu, "(Tensor x, Tensor? bias) -> Tensor")
SHARE4V_OP(bias_gelu_tanh, "(Tensor x, Tensor? bias) -> Tensor")
SHARE4V_OP(bias_swiglu, "(Tensor x, Tensor? bias) -> Tensor")
SHARE4V_OP(bias_gelu_backward, "(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)")
SHARE4V_OP(bias_quick_gelu_backward, "(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)")
SHARE4V_OP(bias_gelu_tanh_backward, "(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)")
SHARE4V_OP(bias_swiglu_backward, "(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)")
