// uint8 pixels to normalized patches. N images of H x W pixels, p the side of a patch, P = floor(H / p) * floor(W / p)
// patches; pixels right of and below the last whole patch are not read.
// Included by binding.cpp.

// pixels [N, H, W, 3], table [3, 256] -> patches [N, P, 3 * p * p], each in the order channel, row, column
SHARE4V_KERNEL(share4v_patchify, int type, const uint8_t* pixels, const void* table, void* patches, int64_t images,
               int64_t height, int64_t width, int64_t patch);

namespace {

Tensor patchify(const Tensor& pixels_, const Tensor& table_, int64_t patch) {
  const bool fits = pixels_.dim() == 4 && pixels_.size(3) == 3 && pixels_.scalar_type() == ScalarType::Byte &&
                    patch > 0 && pixels_.size(1) >= patch && pixels_.size(2) >= patch &&
                    pixels_.size(1) * pixels_.size(2) < (int64_t{1} << 28);
  STD_TORCH_CHECK(fits, "patchify takes uint8 pixels [N, H, W, 3] whose sides are at least the patch's, got ",
                  describe(pixels_), " and patch ", patch);
  STD_TORCH_CHECK(
      table_.dim() == 2 && table_.size(0) == 3 && table_.size(1) == 256 && table_.device() == pixels_.device(),
      "patchify takes a table [3, 256] on the device of the pixels, got ", describe(table_));
  const Tensor pixels = packed(pixels_), table = packed(table_);
  const int64_t images = pixels.size(0), height = pixels.size(1), width = pixels.size(2);
  Tensor patches = empty(table, {images, height / patch * (width / patch), 3 * patch * patch}, table.scalar_type());
  SHARE4V_RUN(share4v_patchify, pixels, type_of(table), static_cast<const uint8_t*>(pixels.data_ptr()),
              table.data_ptr(), patches.data_ptr(), images, height, width, patch);
  return patches;
}

}  // namespace

SHARE4V_OP(patchify, "(Tensor pixels, Tensor table, int patch) -> Tensor")
