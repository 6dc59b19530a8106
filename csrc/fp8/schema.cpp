// FP8 scale and cast. R rows, C columns; codes are bytes, x = code * scale. Included by binding.cpp.

// x [count] -> scale fp32 [1]: amax, at least `least`, over the format's maximum; scratch: 8 bytes
SHARE4V_KERNEL(share4v_fp8_scale, int type, bool e5m2, const void* x, float* scale, uint32_t* scratch, int64_t count,
               float least);
// x [R, C], scale [1] -> codes [R, C] (null: none), transposed [C, padded] (null: none): R rounded up to a multiple of
// 16, padded with zeros
SHARE4V_KERNEL(share4v_fp8_cast, int type, bool e5m2, const void* x, const float* scale, uint8_t* codes,
               uint8_t* transposed, int64_t rows, int64_t columns, int64_t padded);

namespace {

Tensor fp8_scale(const Tensor& x_, bool e5m2, double least) {
  const Tensor x = packed(x_);
  Tensor scale = empty(x, {}, ScalarType::Float), scratch = empty(x, {8}, ScalarType::Byte);
  SHARE4V_RUN(share4v_fp8_scale, x, type_of(x), e5m2, x.data_ptr(), static_cast<float*>(scale.data_ptr()),
              static_cast<uint32_t*>(scratch.data_ptr()), x.numel(), static_cast<float>(least));
  return scale;
}

std::tuple<Tensor, Tensor> fp8_cast_as(const Tensor& x_, const Tensor& scale, bool e5m2, bool straight, bool across) {
  STD_TORCH_CHECK(x_.dim() == 2, "the FP8 cast takes a matrix, got ", describe(x_));
  STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float && scale.device() == x_.device(),
                  "the FP8 cast takes one float32 scale on the device of the matrix, got ", describe(scale));
  const Tensor x = packed(x_);
  const int64_t rows = x.size(0), columns = x.size(1), padded = (rows + 15) / 16 * 16;
  Tensor codes, transposed;
  if (straight) codes = empty(x, {rows, columns}, ScalarType::Byte);
  if (across) transposed = empty(x, {columns, padded}, ScalarType::Byte);
  SHARE4V_RUN(share4v_fp8_cast, x, type_of(x), e5m2, x.data_ptr(), static_cast<const float*>(scale.data_ptr()),
              straight ? static_cast<uint8_t*>(codes.data_ptr()) : nullptr,
              across ? static_cast<uint8_t*>(transposed.data_ptr()) : nullptr, rows, columns, padded);
  return {codes, transposed};
}

Tensor fp8_cast(const Tensor& x, const Tensor& scale, bool e5m2) {
  return std::get<0>(fp8_cast_as(x, scale, e5m2, true, false));
}
Tensor fp8_cast_transposed(const Tensor& x, const Tensor& scale, bool e5m2) {
  return std::get<1>(fp8_cast_as(x, scale, e5m2, false, true));
}
std::tuple<Tensor, Tensor> fp8_cast_both(const Tensor& x, const Tensor& scale, bool e5m2) {
  return fp8_cast_as(x, scale, e5m2, true, true);
}

}  // namespace

SHARE4V_OP(fp8_scale, "(Tensor x, bool e5m2, float least) -> Tensor")
SHARE4V_OP(fp8_cast, "(Tensor x, Tensor scale, bool e5m2) -> Tensor")
SHARE4V_OP(fp8_cast_transposed, "(Tensor x, Tensor scale, bool e5m2) -> Tensor")
SHARE4V_OP(fp8_cast_both, "(Tensor x, Tensor scale, bool e5m2) -> (Tensor, Tensor)")
