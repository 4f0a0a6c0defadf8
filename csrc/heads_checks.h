// The checks of the heads' arguments. grl_ext/_reference_heads.py makes the same ones, in the same order and with the
// same texts.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "checks.h"
#include "heads_options.h"

namespace grl_ext {

inline std::string of_head(const char* name, size_t head) {
  return std::string(name) + "[" + std::to_string(head) + "]";
}

// Whether the tensor has one of the four floating-point types that the operators compute with. 8-bit types are not
// among them.
inline bool is_floating(const at::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

inline void check_features(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have at least one dimension, got shape []");
  TORCH_CHECK_TYPE(is_floating(x), "x must be float16, bfloat16, float32 or float64, got ", dtype_name(x));
}

// Checks one linear layer, whose input has `features` columns.
inline void check_layer(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, size_t layer,
    const c10::SymInt& features) {
  const auto name = of_head("weight", layer);
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.sym_size(1) == features && weight.sym_size(0) > 0, name, " must have shape [K, ",
      features, "] with K at least 1, got ", weight.sym_sizes());
  TORCH_CHECK_VALUE(weight.device() == x.device(), name, " is on ", weight.device(), " but x is on ", x.device());
  TORCH_CHECK_TYPE(
      weight.scalar_type() == x.scalar_type(), name, " must have x's dtype ", dtype_name(x), ", got ",
      dtype_name(weight));
  if (bias) {
    const auto bias_name = of_head("bias", layer);
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), bias_name, " must have shape [",
        weight.sym_size(0), "], got ", bias->sym_sizes());
    TORCH_CHECK_VALUE(bias->device() == x.device(), bias_name, " is on ", bias->device(), " but x is on ", x.device());
    TORCH_CHECK_TYPE(
        bias->scalar_type() == x.scalar_type(), bias_name, " must have x's dtype ", dtype_name(x), ", got ",
        dtype_name(*bias));
  }
}

// Checks the layers of all heads, of which head h has depth[h].
inline void check_layers(
    const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias, at::IntArrayRef depth) {
  check_features(x);
  TORCH_CHECK_VALUE(!weight.empty(), "weight must hold at least one head's matrix, got none");
  TORCH_CHECK_VALUE(
      bias.size() == weight.size(), "bias must have an entry for each of the ", weight.size(),
      " matrices in weight, got ", bias.size());
  size_t layer = 0;
  for (const auto layers : depth) {
    TORCH_CHECK_VALUE(
        layers >= 1 && layer + static_cast<size_t>(layers) <= weight.size(), "depth must be positive and sum to the ",
        weight.size(), " matrices in weight, got ", depth);
    auto features = x.sym_size(-1);
    for (int64_t l = 0; l < layers; ++l, ++layer) {
      check_layer(x, weight[layer], bias.get(layer), layer, features);
      features = weight[layer].sym_size(0);
    }
  }
  TORCH_CHECK_VALUE(
      layer == weight.size(), "depth must be positive and sum to the ", weight.size(), " matrices in weight, got ",
      depth);
}

inline void check_lambda_of_heads(
    const at::Tensor& x, const at::Tensor& lambda, at::IntArrayRef lambda_index, size_t heads) {
  TORCH_CHECK_TYPE(
      lambda.scalar_type() == at::kFloat || lambda.scalar_type() == at::kDouble,
      "lambda_ must be float32 or float64, got ", dtype_name(lambda));
  TORCH_CHECK_VALUE(
      lambda.dim() == 1, "lambda_ must hold the adversaries' numbers, shape [A], got ", lambda.sym_sizes());
  TORCH_CHECK_VALUE(
      lambda.device() == x.device() || lambda.device().is_cpu(), "lambda_ is on ", lambda.device(), " but x is on ",
      x.device());
  TORCH_CHECK_VALUE(
      lambda_index.size() == heads, "lambda_index must have an entry for each of the ", heads, " heads, got ",
      lambda_index.size());
  for (const auto index : lambda_index) {
    TORCH_CHECK_VALUE(
        index >= -1 && index < lambda.sym_size(0),
        "lambda_index must be -1 or an element of lambda_, of which there are ", lambda.sym_size(0), ", got ", index);
  }
  TORCH_CHECK_VALUE(
      !lambda.requires_grad(), "lambda_ requires a gradient, which the heads do not give: pass lambda_.detach()");
}

// The loss has no derivative for its targets and weights. An error is better than a gradient that is silently missing.
inline void refuse_gradient(const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(
      !tensor.requires_grad(), name, " requires a gradient, which the heads' loss does not give: pass ", name,
      ".detach(), or compute this head's loss from heads(features)");
}

// The two checks that read values. All others look at shapes, dtypes and devices only.
inline void check_class(int64_t label, size_t head, int64_t classes, int64_t ignore_index) {
  TORCH_CHECK_INDEX(
      label == ignore_index || (label >= 0 && label < classes), "targets[", head, "] must be in [0, ", classes,
      ") or ignore_index (", ignore_index, "), got ", label);
}

inline void check_sample_weight(double weight, size_t head) {
  TORCH_CHECK_VALUE(
      weight >= 0 && std::isfinite(weight), "sample_weight[", head, "] must be finite and not negative, got ", weight);
}

// `leading`: the sizes of x without the last one.
inline void check_target(
    const at::Tensor& x, const at::Tensor& target, size_t head, c10::SymIntArrayRef leading, const c10::SymInt& size,
    bool squared) {
  const auto name = of_head("targets", head);
  const bool labels = target.scalar_type() == at::kLong;
  TORCH_CHECK_TYPE(
      is_floating(target) || (labels && !squared), name, " must be ",
      squared ? "floating point (values)" : "torch.int64 (classes) or floating point (probabilities)", ", got ",
      dtype_name(target));
  const auto sizes = target.sym_sizes();
  const bool with_size = !sizes.empty() && sizes.slice(0, sizes.size() - 1) == leading && sizes.back() == size;
  const bool without = sizes == leading;
  const bool fits = size == 1 ? with_size || without : labels ? without : with_size;
  const auto expected = [&] {
    auto shape = leading.vec();
    if (!labels && size != 1) {
      shape.push_back(size);
    }
    return shape;
  };
  TORCH_CHECK_VALUE(fits, name, " must have shape ", c10::SymIntArrayRef(expected()), ", got ", sizes);
  TORCH_CHECK_VALUE(target.device() == x.device(), name, " is on ", target.device(), " but x is on ", x.device());
  refuse_gradient(name, target);
}

inline void check_weights(
    const at::Tensor& x, const char* argument, const std::optional<at::Tensor>& weights, size_t head,
    c10::SymIntArrayRef sizes) {
  if (!weights) {
    return;
  }
  const auto name = of_head(argument, head);
  TORCH_CHECK_TYPE(is_floating(*weights), name, " must be floating point, got ", dtype_name(*weights));
  TORCH_CHECK_VALUE(weights->sym_sizes() == sizes, name, " must have shape ", sizes, ", got ", weights->sym_sizes());
  TORCH_CHECK_VALUE(weights->device() == x.device(), name, " is on ", weights->device(), " but x is on ", x.device());
  refuse_gradient(name, *weights);
}

// Checks the options of the loss. Head h has sizes[h] columns of logits.
inline void check_options(const at::Tensor& x, const std::vector<c10::SymInt>& sizes, const HeadsOptions& options) {
  const auto heads = sizes.size();
  const auto count = [&](const char* name, size_t entries) {
    TORCH_CHECK_VALUE(entries == heads, name, " must have an entry for each of the ", heads, " heads, got ", entries);
  };
  count("targets", options.targets.size());
  count("sample_weight", options.sample_weight.size());
  count("class_weight", options.class_weight.size());
  count("kind", options.kind.size());
  count("label_smoothing", options.label_smoothing.size());
  count("ignore_index", options.ignore_index.size());
  const auto leading = x.sym_sizes().slice(0, x.dim() - 1);
  for (size_t h = 0; h < heads; ++h) {
    const bool squared = options.kind[h] == kSquaredError;
    TORCH_CHECK_VALUE(
        squared || options.kind[h] == kCrossEntropy, "kind must be 0 (cross entropy) or 1 (squared error), got ",
        options.kind[h]);
    check_target(x, options.targets[h], h, leading, sizes[h], squared);
    check_weights(x, "sample_weight", options.sample_weight.get(h), h, leading);
    TORCH_CHECK_VALUE(
        !squared || !options.class_weight.get(h), of_head("class_weight", h),
        " is for a cross entropy, this head has a squared error");
    const c10::SymInt classes = sizes[h] > 1 ? sizes[h] : c10::SymInt(2);
    check_weights(x, "class_weight", options.class_weight.get(h), h, {classes});
    TORCH_CHECK_VALUE(
        options.label_smoothing[h] >= 0 && options.label_smoothing[h] <= 1, of_head("label_smoothing", h),
        " must be in [0, 1], got ", options.label_smoothing[h]);
    TORCH_CHECK_VALUE(
        !squared || options.label_smoothing[h] == 0, of_head("label_smoothing", h),
        " is for a cross entropy, this head has a squared error");
  }
  if (options.loss_weight) {
    const auto& weights = *options.loss_weight;
    TORCH_CHECK_TYPE(!weights.is_complex(), "loss_weight must hold real numbers, got ", dtype_name(weights));
    TORCH_CHECK_VALUE(
        weights.dim() == 1 && weights.sym_size(0) == static_cast<int64_t>(heads),
        "loss_weight must have an entry for each of the ", heads, " heads, got shape ", weights.sym_sizes());
    TORCH_CHECK_VALUE(
        weights.device() == x.device() || weights.device().is_cpu(), "loss_weight is on ", weights.device(),
        " but x is on ", x.device());
    refuse_gradient("loss_weight", weights);
  }
}

}  // namespace grl_ext
