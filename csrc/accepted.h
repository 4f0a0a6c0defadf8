// Whether the compiled operations take their arguments. Why they do not is for grl_ext/_checks.py to say.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>

#include "heads_options.h"

namespace grl_ext {

// One of the four floating-point types that the operators compute with. 8-bit types are not among them.
inline bool is_floating(const at::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

// The lambda of a reversal of x.
inline bool accepts_lambda(const at::Tensor& x, const at::Tensor& lambda) {
  const bool elsewhere = lambda.device() != x.device();
  const auto offset = x.dim() - lambda.dim();
  if (lambda.is_complex() || (elsewhere && (lambda.dim() > 0 || !lambda.device().is_cpu())) || offset < 0) {
    return false;
  }
  for (int64_t d = 0; d < lambda.dim(); ++d) {
    if (lambda.sym_size(d) != 1 && lambda.sym_size(d) != x.sym_size(offset + d)) {
      return false;
    }
  }
  return true;
}

inline bool accepts_lambda_of_head(const at::Tensor& x, const at::Tensor& lambda) {
  return lambda.dim() == 0 && !lambda.is_complex() && !lambda.requires_grad() &&
      (lambda.device().is_cpu() || lambda.device() == x.device());
}

// A linear layer whose input has the last dimension of x.
inline bool accepts_layer(
    const at::Tensor& x, const c10::SymInt& features, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto alike = [&](const at::Tensor& tensor) {
    return tensor.device() == x.device() && tensor.scalar_type() == x.scalar_type() && tensor.layout() == at::kStrided;
  };
  return weight.dim() == 2 && weight.sym_size(1) == features && weight.sym_size(0) > 0 && alike(weight) &&
      (!bias || (bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0) && alike(*bias)));
}

inline bool accepts_heads(const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias) {
  if (x.dim() == 0 || !is_floating(x) || x.layout() != at::kStrided || weight.empty() || bias.size() != weight.size()) {
    return false;
  }
  for (size_t h = 0; h < weight.size(); ++h) {
    if (!accepts_layer(x, x.sym_size(-1), weight[h], bias.get(h))) {
      return false;
    }
  }
  return true;
}

// Layers of which each takes the output of the one before, the first of them z.
inline bool accepts_layers(const at::Tensor& z, at::TensorList weight, const OptionalTensors& bias) {
  bool accepted = z.dim() > 0 && is_floating(z) && bias.size() == weight.size();
  for (size_t l = 0; accepted && l < weight.size(); ++l) {
    accepted = accepts_layer(z, l == 0 ? z.sym_size(-1) : weight[l - 1].sym_size(0), weight[l], bias.get(l));
  }
  return accepted;
}

// Whether these are leading sizes and one more.
inline bool have_one_more(c10::SymIntArrayRef sizes, c10::SymIntArrayRef leading, const c10::SymInt& more) {
  return !sizes.empty() && sizes.slice(0, sizes.size() - 1) == leading && sizes.back() == more;
}

inline bool accepts_target(
    const at::Tensor& target, int64_t kind, c10::SymIntArrayRef leading, const c10::SymInt& size) {
  const bool with_size = have_one_more(target.sym_sizes(), leading, size);
  const bool without = target.sym_sizes() == leading;
  const bool integral = target.scalar_type() == at::kLong;
  if (kind == kCrossEntropy && integral) {
    return without || (with_size && size == 1);
  }
  const bool zero_or_one = kind == kBinaryCrossEntropy && (integral || target.scalar_type() == at::kBool);
  return (is_floating(target) || zero_or_one) && (with_size || (without && size == 1));
}

inline bool have_entries(const HeadsOptions& options, size_t heads) {
  const auto& weights = options.loss_weight;
  return options.targets.size() == heads && options.sample_weight.size() == heads &&
      options.class_weight.size() == heads && options.kind.size() == heads && options.label_smoothing.size() == heads &&
      options.ignore_index.size() == heads &&
      (!weights || (weights->dim() == 1 && weights->sym_size(0) == static_cast<int64_t>(heads)));
}

// Head h has sizes[h] columns of logits. What is a number is checked where the options are packed.
inline bool accepts_options(const at::Tensor& x, const std::vector<c10::SymInt>& sizes, const HeadsOptions& options) {
  const auto heads = sizes.size();
  if (!have_entries(options, heads)) {
    return false;
  }
  // The loss has no derivative for its targets and weights.
  const auto is_data = [&](const at::Tensor& tensor) {
    return tensor.device() == x.device() && tensor.layout() == at::kStrided && !tensor.requires_grad();
  };
  const auto are_weights = [&](const std::optional<at::Tensor>& weights, c10::SymIntArrayRef shape) {
    return !weights || (is_floating(*weights) && weights->sym_sizes() == shape && is_data(*weights));
  };
  const auto leading = x.sym_sizes().slice(0, x.dim() - 1);
  for (size_t h = 0; h < heads; ++h) {
    const auto kind = options.kind[h];
    const c10::SymInt classes = sizes[h] > 1 ? sizes[h] : c10::SymInt(2);
    const auto sample_weight = options.sample_weight.get(h), class_weight = options.class_weight.get(h);
    const bool of_entries = is_by_output(kind) && sample_weight &&
        have_one_more(sample_weight->sym_sizes(), leading, sizes[h]);
    if (!is_data(options.targets[h]) || !accepts_target(options.targets[h], kind, leading, sizes[h]) ||
        !are_weights(sample_weight, of_entries ? sample_weight->sym_sizes() : leading) ||
        (is_by_output(kind) && (class_weight || options.label_smoothing[h] != 0)) ||
        !are_weights(class_weight, {classes})) {
      return false;
    }
  }
  const auto& weights = options.loss_weight;
  return !weights ||
      (!weights->is_complex() && (weights->device() == x.device() || weights->device().is_cpu()) &&
       !weights->requires_grad());
}

}  // namespace grl_ext
