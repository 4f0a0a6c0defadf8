// The losses of heads of which some may have hidden layers, in one call from Python. Linear heads are heads_loss; of the
// others, as functional.py composes them, the first layers together, the hidden layers, each one's last layer with its
// loss.
#include <pytorch.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>

#include "../accepted.h"
#include "../ops.h"
#include "heads.h"
#include "node.h"

namespace grl_ext {
namespace {

using at::Tensor;

// The losses of all heads, as they come.
class Collected {
 public:
  explicit Collected(size_t heads) : losses_(heads), logits_(heads) {}

  void add(LossAndLogits result, const std::vector<size_t>& heads) {
    auto& [loss, losses, logits] = result;
    total_ = total_.defined() ? at::add(total_, loss) : std::move(loss);
    for (size_t i = 0; i < heads.size(); ++i) {
      losses_[heads[i]] = std::move(losses[i]);
      logits_[heads[i]] = std::move(logits[i]);
    }
  }

  LossAndLogits result() && { return {std::move(total_), std::move(losses_), std::move(logits_)}; }

 private:
  Tensor total_;
  std::vector<Tensor> losses_, logits_;
};

}  // namespace

std::optional<LossAndLogits> layered_heads_loss(
    const Tensor& x, const std::vector<Layers>& heads, std::vector<Factor> factors, HeadsOptions options) {
  std::vector<size_t> linear, layered;
  for (size_t h = 0; h < heads.size(); ++h) {
    if (heads[h].weight.empty() || heads[h].bias.size() != heads[h].weight.size()) {
      return std::nullopt;
    }
    (heads[h].weight.size() == 1 ? linear : layered).push_back(h);
  }
  const auto first_layers = [&](const std::vector<size_t>& chosen) {
    std::vector<Tensor> weight;
    OptionalTensors bias;
    weight.reserve(chosen.size());
    bias.reserve(chosen.size());
    for (const auto h : chosen) {
      weight.push_back(heads[h].weight[0]);
      bias.push_back(heads[h].bias[0]);
    }
    return std::pair(std::move(weight), std::move(bias));
  };
  if (layered.empty()) {
    const auto [weight, bias] = first_layers(linear);
    return heads_loss(x, weight, bias, std::move(factors), std::move(options));
  }
  // Declined before anything is computed, so that no dispatch mode sees it twice. Where a later head is declined, those
  // before it are computed once more.
  if (!has_kernel(x) || factors.size() != heads.size() || !have_entries(options, heads.size())) {
    return std::nullopt;
  }
  Collected collected(heads.size());
  if (!linear.empty()) {
    const auto [weight, bias] = first_layers(linear);
    auto result = heads_loss(x, weight, bias, some(factors, linear), some(options, linear));
    if (!result) {
      return std::nullopt;
    }
    collected.add(std::move(*result), linear);
  }
  const auto [weight, bias] = first_layers(layered);
  auto outputs = linear_heads(x, weight, bias, some(factors, layered));
  if (!outputs) {
    return std::nullopt;
  }
  for (size_t i = 0; i < layered.size(); ++i) {
    const auto h = layered[i];
    const size_t last = heads[h].weight.size() - 1;
    const auto layers = at::TensorList(heads[h].weight);
    OptionalTensors between, of_last;
    for (size_t l = 1; l <= last; ++l) {
      (l < last ? between : of_last).push_back(heads[h].bias[l]);
    }
    // Taken out, so that nothing else holds what the hidden layers overwrite.
    const auto hidden = hidden_layers(std::exchange((*outputs)[i], Tensor()), layers.slice(1, last - 1), between);
    auto result = hidden ? heads_loss(*hidden, layers.slice(last), of_last, {Factor{}}, some(options, {h}))
                         : std::nullopt;
    if (!result) {
      return std::nullopt;
    }
    collected.add(std::move(*result), {h});
  }
  return std::move(collected).result();
}

}  // namespace grl_ext
