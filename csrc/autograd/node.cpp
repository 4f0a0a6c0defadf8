#include <pytorch.h>

#include "node.h"

#include <ATen/FuncTorchTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#ifdef GRL_EXT_WITH_CUDA
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

#include "../cuda/device_code.h"
#endif

namespace grl_ext {
namespace {

// The values of tensors of these kinds are not those at their data pointer.
constexpr c10::DispatchKeySet kNotPlain{c10::DispatchKey::Python,           c10::DispatchKey::PythonTLSSnapshot,
                                        c10::DispatchKey::Functionalize,    c10::DispatchKey::Conjugate,
                                        c10::DispatchKey::Negative,         c10::DispatchKey::ZeroTensor,
                                        c10::DispatchKey::NestedTensor,     c10::DispatchKey::Batched,
                                        c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper};

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

torch::autograd::variable_list call_traced(
    const torch::autograd::Node& node, torch::dynamo::autograd::SwapSavedVariables& swap,
    const torch::autograd::variable_list& grads, const torch::autograd::variable_list& saved, TracedBackward backward) {
  using namespace torch::dynamo::autograd;
  // A graph cannot hold undefined tensors. The defined ones are the arguments; when the call runs, `present` says where
  // they belong.
  std::vector<at::IValue> arguments;
  std::vector<bool> present;
  for (const auto& tensor : saved) {
    present.push_back(tensor.defined());
    if (tensor.defined()) {
      arguments.emplace_back(tensor);
    }
  }
  auto run = [backward = std::move(backward), present](
                 const variable_list& grads, const std::vector<at::IValue>& arguments) {
    variable_list saved(present.size());
    for (size_t i = 0, next = 0; i < present.size(); ++i) {
      if (present[i]) {
        saved[i] = arguments[next++].toTensor();
      }
    }
    return backward(grads, saved);
  };
  const auto& compiler = getPyCompilerInterface();
  const auto name = compiler->bind_function(
      swap.get_py_compiler(), node.name(), run, std::vector<at::TypePtr>(arguments.size(), at::TensorType::get()),
      /*is_custom_function=*/true, /*is_traceable=*/true);
  const auto edges = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
      get_input_metadata(node.next_edges()));
  return compiler->call_function(swap.get_py_compiler(), "apply_functional", name, grads, arguments, edges);
}

bool is_plain(const at::Tensor& tensor) {
  return !tensor.key_set().has_any(kNotPlain);
}

bool is_batched_or_dual(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kBatched{c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched};
  return tensor.key_set().has_any(kBatched) || torch::autograd::isFwGradDefined(tensor);
}

bool serves_gpu(int index) {
#ifdef GRL_EXT_WITH_CUDA
  // 0: not asked yet, 1: no, 2: yes. A GPU that is not there belongs to a graph that runs elsewhere.
  static std::array<std::atomic<char>, 64> known{};
  const bool is_kept = index >= 0 && index < static_cast<int>(known.size());
  if (is_kept && known[index] != 0) {
    return known[index] == 2;
  }
  int major = 0, minor = 0;
  const bool exists = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) == cudaSuccess;
  if (!exists) {
    static_cast<void>(cudaGetLastError());  // or the next launch would report it
    return true;
  }
  const bool serves = any_code_serves(GRL_EXT_CUDA_CODE, major, minor);
  if (is_kept) {
    known[index] = serves ? 2 : 1;
  }
  return serves;
#else
  static_cast<void>(index);
  return false;
#endif
}

bool on_kernels_device(const at::Tensor& tensor) {
  return tensor.is_cpu() || (tensor.is_cuda() && serves_gpu(tensor.get_device()));
}

bool has_kernel(const at::Tensor& tensor) {
  return on_kernels_device(tensor) && tensor.layout() == at::kStrided && is_plain(tensor) &&
      is_supported_dtype(tensor.scalar_type()) && !c10::impl::dispatch_mode_enabled();
}

void refuse_functorch() {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) {
    functorch->checkSupportsCppAutogradFunction();
  }
}

bool is_unshared(const at::Tensor& tensor) {
  // One holder of the tensor and one of its storage: no Python variable, hook, saved tensor or view. Storage that
  // PyTorch cannot resize belongs to somebody else (NumPy, DLPack, shared memory), who may still look at it.
  return tensor.use_count() == 1 && tensor.storage().use_count() == 1 && tensor.storage().resizable() &&
      tensor.is_non_overlapping_and_dense();
}

}  // namespace grl_ext
