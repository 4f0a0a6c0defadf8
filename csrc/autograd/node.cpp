#include "node.h"

#include <ATen/FuncTorchTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

namespace grl_ext {
namespace {

// Tensors of these kinds are not what their data pointer says.
constexpr c10::DispatchKeySet kNotPlain{
    c10::DispatchKey::Python,       c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::Functionalize,
    c10::DispatchKey::Conjugate,    c10::DispatchKey::Negative,          c10::DispatchKey::ZeroTensor,
    c10::DispatchKey::NestedTensor, c10::DispatchKey::Batched,           c10::DispatchKey::FuncTorchBatched,
    c10::DispatchKey::FuncTorchGradWrapper};

bool is_supported_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
    case at::kBFloat16:
    case at::kFloat:
    case at::kDouble:
    case at::kComplexFloat:
    case at::kComplexDouble:
      return true;
    default:
      return false;
  }
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  return !tensor.key_set().has_any(kNotPlain);
}

bool is_batched(const at::Tensor& tensor) {
  return tensor.key_set().has_any(c10::DispatchKeySet{c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
}

bool has_kernel(const at::Tensor& tensor) {
#ifdef GRL_EXT_WITH_CUDA
  const bool on_device = tensor.is_cpu() || tensor.is_cuda();
#else
  const bool on_device = tensor.is_cpu();
#endif
  return on_device && tensor.layout() == at::kStrided && is_plain(tensor) &&
      is_supported_dtype(tensor.scalar_type()) &&
      // A dispatch mode (make_fx, FakeTensorMode, a profiler of ours or yours) is to see plain ATen operators.
      !c10::impl::dispatch_mode_enabled();
}

void refuse_functorch() {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) {
    functorch->checkSupportsCppAutogradFunction();
  }
}

bool is_unshared(const at::Tensor& tensor) {
  // One holder of the tensor and one of its storage: no Python variable, hook, saved tensor or view. Storage that PyTorch cannot
  // resize belongs to somebody else (NumPy, DLPack, shared memory), who may still look at it.
  return tensor.use_count() == 1 && tensor.storage().use_count() == 1 && tensor.storage().resizable() &&
      tensor.is_non_overlapping_and_dense();
}

}  // namespace grl_ext
