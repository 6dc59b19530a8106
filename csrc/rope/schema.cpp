// Rotary positions of queries and keys in one call. T tokens (S x B), D the width of a head. Included by binding.cpp.

// query: rows of `heads` x D at a distance of `query_stride` elements, key likewise with `groups`; table fp32 [places,
// D], cosines in its first half; positions [T] (null: token t is at t / batch) -> rotated_query [T, heads, D],
// rotated_key [T, groups, D]; inverse: by the negative angle
SHARE4V_KERNEL(share4v_rope, int type, const void* query, const void* key, const float* table, const int64_t* positions,
               void* rotated_query, void* rotated_key, int64_t tokens, int64_t batch, int64_t heads, int64_t groups,
               int64_t width, int64_t query_stride, int64_t key_stride, int64_t places, bool inverse);

namespace {

// Tokens [S x B] of D-wide heads at a distance of `stride` elements.
struct Tokens {
  Tensor held;
  int64_t stride;
};

// Read in place when evenly spaced, as slices of a fused projection are. The stride of a dimension of size one is
// arbitrary.
Tokens rope_tokens(const Tensor& x) {
  const int64_t length = x.size(0), batch = x.size(1), heads = x.size(2), width = x.size(3);
  const int64_t stride = batch > 1 ? x.stride(1) : length > 1 ? x.stride(0) : heads * width;
  const bool even = x.stride(3) == 1 && (heads <= 1 || x.stride(2) == width) &&
                    (batch <= 1 || length <= 1 || x.stride(0) == batch * stride);
  return even ? Tokens{x, stride} : Tokens{packed(x), heads * width};
}

std::tuple<Tensor, Tensor> rope(const Tensor& query_, const Tensor& key_, const Tensor& table_,
                                const std::optional<Tensor>& positions_, bool inverse) {
  STD_TORCH_CHECK(query_.dim() == 4 && key_.dim() == 4 && query_.size(3) % 2 == 0 && query_.size(3) > 0,
                  "rope takes queries [S, B, heads, D] and keys [S, B, groups, D] with an even D, got ",
                  describe(query_), " and ", describe(key_));
  const int64_t length = query_.size(0), batch = query_.size(1), width = query_.size(3),
                fitting[] = {length, batch, key_.size(2), width};
  check_like(key_, "key", query_, {fitting, 4});
  STD_TORCH_CHECK(table_.dim() == 2 && table_.size(1) == width && table_.scalar_type() == ScalarType::Float &&
                      table_.device() == query_.device(),
                  "rope takes a float32 table [places, D] on the device of the queries, got ", describe(table_),
                  " for ", describe(query_));
  if (positions_) {
    STD_TORCH_CHECK(positions_->dim() == 2 && positions_->size(0) == length && positions_->size(1) == batch &&
                        positions_->scalar_type() == ScalarType::Long && positions_->device() == query_.device(),
                    "rope takes int64 positions [S, B] on the device of the queries, got ", describe(*positions_),
                    " for ", describe(query_));
  } else {
    STD_TORCH_CHECK(table_.size(0) >= length, "without positions, rope needs a place in the table for each of S, got ",
                    describe(table_), " for ", describe(query_));
  }
  const Tokens query = rope_tokens(query_), key = rope_tokens(key_);
  const Tensor table = packed(table_), positions = positions_ ? packed(*positions_) : Tensor();
  Tensor rotated_query = empty_as(query_), rotated_key = empty_as(key_);
  SHARE4V_RUN(share4v_rope, query_, type_of(query_), query.held.data_ptr(), key.held.data_ptr(),
              static_cast<const float*>(table.data_ptr()),
              positions_ ? static_cast<const int64_t*>(positions.data_ptr()) : nullptr, rotated_query.data_ptr(),
              rotated_key.data_ptr(), length * batch, batch, query_.size(2), key_.size(2), width, query.stride,
              key.stride, table.size(0), inverse);
  return {rotated_query, rotated_key};
}

}  // namespace

SHARE4V_OP(rope, "(Tensor query, Tensor key, Tensor table, Tensor? positions, bool inverse) -> (Tensor, Tensor)")
