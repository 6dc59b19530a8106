// The only translation unit that includes torch: every op's schema and the code between tensors and kernels. Include an
// op's schema.cpp here.
#include "common/binding.h"

#include "activation/schema.cpp"
#include "adamw/schema.cpp"
#include "fp8/schema.cpp"
#include "image_merge/schema.cpp"
#include "linear_cross_entropy/schema.cpp"
#include "norm/schema.cpp"
#include "patchify/schema.cpp"
#include "rope/schema.cpp"

#ifdef SHARE4V_EMULATE
#include "emulate/fibers.h"
// Seed of the random order in which the fibers of a block run.
extern "C" __attribute__((visibility("default"))) void share4v_emulate_seed(unsigned seed) {
  emulate::machine().random.seed(seed);
}
#endif
