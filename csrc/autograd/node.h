// What the autograd nodes share.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/version.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace grl_ext {

// A new node, in the kind of pointer that this torch uses for nodes.
template <class T, class... Args>
auto make_node(Args&&... args) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return c10::make_intrusive<T>(std::forward<Args>(args)...);
#else
  return std::shared_ptr<T>(new T(std::forward<Args>(args)...), torch::autograd::deleteNode);
#endif
}

// Such a pointer to a node, from inside the node.
inline auto holder_of(torch::autograd::Node& node) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return c10::intrusive_ptr<torch::autograd::Node>::reclaim_copy(&node);
#else
  return node.getptr();
#endif
}

// An operator of schema.cpp.
template <class Signature>
auto find_kernel(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("grl_ext::") + name).c_str(), "")
      .typed<Signature>();
}

// Tensors that a node has saved, undefined ones among them. The caller holds the node's mutex.
class SavedList {
 public:
  void reserve(size_t size) { list_.reserve(size); }

  void save(const at::Tensor& tensor, bool is_output = false) { list_.emplace_back(tensor, is_output); }

  void save(const std::optional<at::Tensor>& tensor) { save(tensor.value_or(at::Tensor())); }

  size_t size() const { return list_.size(); }

  at::Tensor unpack(size_t i, torch::autograd::Node& node) const { return list_[i].unpack(holder_of(node)); }

  std::vector<at::Tensor> unpack(torch::autograd::Node& node) const {
    std::vector<at::Tensor> tensors;
    tensors.reserve(size());
    for (size_t i = 0; i < size(); ++i) {
      tensors.push_back(unpack(i, node));
    }
    return tensors;
  }

  void release() {
    for (auto& saved : list_) {
      saved.reset_data();
    }
  }

  template <class Visit>
  void each(Visit visit) {
    std::for_each(list_.begin(), list_.end(), visit);
  }

 private:
  std::vector<torch::autograd::SavedVariable> list_;
};

// A backward without a node: a function of the incoming gradients and the saved tensors that holds all else by value.
using TracedBackward = std::function<torch::autograd::variable_list(
    const torch::autograd::variable_list& grads, const torch::autograd::variable_list& saved)>;

// Puts a call of `backward` into the graph that compiled autograd is making. `node` gives its name and edges.
torch::autograd::variable_list call_traced(
    const torch::autograd::Node& node, torch::dynamo::autograd::SwapSavedVariables& swap,
    const torch::autograd::variable_list& grads, const torch::autograd::variable_list& saved, TracedBackward backward);

// A node that compiled autograd can trace. Its saved tensors become inputs of the graph, so that one graph serves all
// their values. The node has
//   template <class Visit> void each_saved(Visit visit);    what it saves, SavedVariable or Tensor, always in one order
//   void collect_constants(CompiledNodeArgs& args) const;   what else its backward reads: another value, another graph
//   TracedBackward traced() const;                          its backward, given what each_saved visits
template <class T>
class TraceableNode : public torch::autograd::Node {
 public:
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    self().collect_constants(args);
    self().each_saved([&](auto& saved) {
      if constexpr (std::is_same_v<std::decay_t<decltype(saved)>, at::Tensor>) {
        args.collect(saved);
      } else {
        // True for saved results, which must know their node. It does no harm to saved inputs.
        args.collect(saved, /*is_output=*/true);
      }
    });
  }

  torch::autograd::variable_list apply_with_saved(
      const torch::autograd::variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    torch::autograd::variable_list tensors;
    self().each_saved([&](auto& saved) {
      swap.before(saved);
      if constexpr (std::is_same_v<std::decay_t<decltype(saved)>, at::Tensor>) {
        tensors.push_back(saved);
      } else {
        tensors.push_back(saved.unpack());
      }
    });
    auto results = call_traced(*this, swap, grads, tensors, self().traced());
    self().each_saved([&](auto& saved) { swap.after(saved); });
    return results;
  }

 protected:
  // Which of the results are asked for: in the backward, and while it is traced.
  std::vector<bool> needs() const {
    return flags([this](size_t i) { return should_compute_output(i); });
  }
  std::vector<bool> needs_when_traced() const {
    return flags([this](size_t i) { return task_should_compute_output(i); });
  }

 private:
  template <class Predicate>
  std::vector<bool> flags(Predicate is_set) const {
    std::vector<bool> flags(num_outputs());
    for (size_t i = 0; i < flags.size(); ++i) {
      flags[i] = is_set(i);
    }
    return flags;
  }

  // each_saved is not const, because `before` and `after` replace what it visits.
  T& self() const { return static_cast<T&>(const_cast<TraceableNode&>(*this)); }
};

// Whether the tensor's values are those at its data pointer: no subclass, no batch of a transform, no lazy conjugate.
bool is_plain(const at::Tensor& tensor);

// Whether only PyTorch's own operators see all that the tensor stands for: a batch of tensors (under vmap, or where
// gradients are taken with is_grads_batched), or a value and its forward-mode tangent.
bool is_batched_or_dual(const at::Tensor& tensor);

// Whether kernels were compiled for this GPU. Where not, operations are declined, and plain PyTorch takes them.
bool serves_gpu(int index);

bool on_kernels_device(const at::Tensor& tensor);

// Whether the kernels take this tensor: a plain strided one, on a device and of a dtype that they were compiled for.
// Not under a dispatch mode (make_fx, FakeTensorMode, a user's own mode), which has to see plain ATen operators.
bool has_kernel(const at::Tensor& tensor);

// Raises PyTorch's own error inside a torch.func transform, which would silently ignore a C++ node. The Python
// functions take their other path there; this guards torch.ops.
void refuse_functorch();

// Whether on the host only `tensor` itself refers to its memory, now and later. It says nothing about kernels that are
// still queued: see Made in scale.h.
bool is_unshared(const at::Tensor& tensor);

}  // namespace grl_ext
