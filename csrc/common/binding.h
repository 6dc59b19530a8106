// Helpers of schema.cpp files, which binding.cpp includes: checks, allocation, kernel calls. Only torch's stable ABI
// (2.11 and later) is used, without ATen headers, so that one binary works with every torch and Python.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "types.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Declares the CPU and CUDA versions of a kernel; the last argument is the stream, which the CPU version ignores.
#define SHARE4V_KERNEL(name, ...) \
  extern "C" int name##_cpu(__VA_ARGS__, void*); \
  extern "C" int name##_cuda(__VA_ARGS__, void*)

// Calls the version for the device of `tensor`, on its current stream; raises when it fails. Under emulation the CUDA
// version runs on CPU tensors.
#if defined(SHARE4V_EMULATE)
#define SHARE4V_RUN(name, tensor, ...) check_status(name##_cuda(__VA_ARGS__, nullptr), #name, (tensor))
#elif defined(SHARE4V_CUDA)
#define SHARE4V_RUN(name, tensor, ...) \
  do { \
    if ((tensor).is_cuda()) { \
      torch::stable::accelerator::DeviceGuard guard((tensor).get_device_index()); \
      check_status(name##_cuda(__VA_ARGS__, current_stream((tensor).get_device_index())), #name, (tensor)); \
    } else { \
      check_status(name##_cpu(__VA_ARGS__, nullptr), #name, (tensor)); \
    } \
  } while (0)
#else
#define SHARE4V_RUN(name, tensor, ...) check_status(name##_cpu(__VA_ARGS__, nullptr), #name, (tensor))
#endif

// Defines an op: its schema, and the function of that name, which implements it on every device.
#if defined(SHARE4V_CUDA)
#define SHARE4V_OP_CUDA(name) \
  STABLE_TORCH_LIBRARY_IMPL(share4v, CUDA, library) { library.impl(#name, TORCH_BOX(&name)); }
#else
#define SHARE4V_OP_CUDA(name)
#endif
#define SHARE4V_OP(name, schema) \
  STABLE_TORCH_LIBRARY_FRAGMENT(share4v, library) { library.def(#name schema); } \
  STABLE_TORCH_LIBRARY_IMPL(share4v, CPU, library) { library.impl(#name, TORCH_BOX(&name)); } \
  SHARE4V_OP_CUDA(name)

namespace {

[[maybe_unused]] std::string describe(const Tensor& tensor) {
  std::string text = torch::headeronly::toString(tensor.scalar_type());
  text += " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

[[maybe_unused]] void check_status(int status, const char* kernel, const Tensor& tensor) {
  if (status == kDone) return;
  const char* why = status == kUnknownType       ? "does not support this element type; use float32 or bfloat16"
                    : status == kIndexOutOfRange ? "got an index outside its range"
                    : status == kTooWide         ? "needs more shared memory than a block has; use narrower rows"
                                                 : "could not be launched (the status is the CUDA error)";
  STD_TORCH_CHECK(false, kernel, " on ", describe(tensor), ": ", why, "; status ", status);
}

// libtorch_cuda is not linked, so that the library also loads without it; where there are CUDA tensors it is already
// loaded. Kernels run on PyTorch's current stream.
[[maybe_unused]] void* current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Getter>(cuda ? dlsym(cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(getter && getter(device, &stream) == 0, "no current CUDA stream of device ", device,
                  ": libtorch_cuda.so is not loaded or has no such function");
  return stream;
}

[[maybe_unused]] int type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, "the ops take float32 and bfloat16, got ", describe(tensor));
      return -1;
  }
}

// Returns the tensor itself where it is contiguous: a call through the dispatcher costs a microsecond.
[[maybe_unused]] Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

[[maybe_unused]] Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, type);
}

[[maybe_unused]] Tensor empty_as(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

// Raises unless both have the same element type and device, and `other` has this shape.
[[maybe_unused]] void check_like(const Tensor& other, const char* name, const Tensor& tensor,
                                 torch::headeronly::IntHeaderOnlyArrayRef shape) {
  bool same = other.scalar_type() == tensor.scalar_type() && other.device() == tensor.device() &&
              other.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = other.size(i) == shape[i];
  STD_TORCH_CHECK(same, name, " is ", describe(other), ", which does not fit ", describe(tensor),
                  " (shape, element type or device)");
}

}  // namespace
