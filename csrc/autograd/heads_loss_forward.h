// The heads of one loss, their layers and options; and their losses, computed together with the gradients.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/variable.h>

#include <optional>
#include <vector>

#include "../gradient_slots.h"
#include "head_inputs.h"
#include "head_layers.h"

namespace grl_ext {

class HeadsOfLoss {
 public:
  HeadsOfLoss(HeadLayers layers, at::IntArrayRef depth, HeadsOptions options);

  size_t count() const { return first_.size() - 1; }

  GradientSlots slots() const { return {first_.back()}; }

  const HeadLayers& layers() const { return layers_; }

  const HeadsOptions& options() const { return options_; }

  HeadsOptions take_options() { return std::move(options_); }

  // The number of each head's layers.
  std::vector<int64_t> depth() const;

  // A head's first layer among all.
  size_t first(size_t h) const { return first_[h]; }

  bool is_linear(size_t h) const { return first_[h] + 1 == first_[h + 1]; }

  bool all_linear() const { return first_.back() == count(); }

  std::vector<size_t> all() const;

  std::vector<size_t> linear_of(const std::vector<size_t>& heads) const;

  LayersOfHead layers_of(size_t h, const std::vector<bool>& needs) const;

  struct Result {
    at::Tensor loss;
    std::vector<at::Tensor> head_losses, logits;
    torch::autograd::variable_list gradients;  // by GradientSlots; undefined where not needed
  };

  // The losses of the heads in `asked`, and the gradients that are needed. In these each head counts with its
  // loss_weight.
  Result compute(
      const std::vector<size_t>& asked, const at::Tensor& x, const std::optional<at::Tensor>& loss_weight,
      const std::vector<bool>& needs) const;

 private:
  HeadsOptions options_of(const std::vector<size_t>& heads, const std::optional<at::Tensor>& loss_weight) const;
  void compute_linear(
      Result& result, const std::vector<size_t>& heads, const at::Tensor& x,
      const std::optional<at::Tensor>& loss_weight, const std::vector<bool>& needs) const;
  void compute_layers(
      Result& result, size_t h, const at::Tensor& x, const std::optional<at::Tensor>& loss_weight,
      const std::vector<bool>& needs) const;

  HeadLayers layers_;
  HeadsOptions options_;
  std::vector<size_t> first_;  // each head's first layer; at the end, the number of layers
};

}  // namespace grl_ext
