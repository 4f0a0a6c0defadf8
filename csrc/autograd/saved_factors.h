// The heads' factors in a node, and in what compiled autograd makes of it.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <functional>
#include <utility>
#include <vector>

#include "../heads_options.h"

namespace grl_ext {

class SavedFactors {
 public:
  explicit SavedFactors(HeadFactors factors) : factors_(std::move(factors)) {
    for (size_t h = 0; h < factors_.value.size(); ++h) {
      tensors_.push_back(factors_.tensor.get(h).value_or(at::Tensor()));
    }
  }

  const HeadFactors& get() const { return factors_; }

  // For TraceableNode. Numbers are saved as tensors there, so that one graph serves all their values; but not 1, a
  // predictor's.
  template <class Visit>
  void each_saved(Visit visit) {
    for (size_t h = 0; h < tensors_.size(); ++h) {
      if (!tensors_[h].defined() && factors_.value[h] != 1) {
        tensors_[h] = at::scalar_tensor(factors_.value[h], at::kDouble);
      }
      visit(tensors_[h]);
    }
  }

  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const { args.collect(constants()); }

  // Makes the factors of a traced backward from the tensors that each_saved visits.
  std::function<HeadFactors(const std::vector<at::Tensor>& saved)> traced() const {
    return [values = constants()](const std::vector<at::Tensor>& saved) {
      HeadFactors factors{values, OptionalTensors()};
      for (const auto& tensor : saved) {
        factors.tensor.push_back(tensor.defined() ? std::optional(tensor) : std::nullopt);
      }
      return factors;
    };
  }

 private:
  // What stays a number where the other numbers are tensors.
  std::vector<double> constants() const {
    std::vector<double> values;
    for (size_t h = 0; h < factors_.value.size(); ++h) {
      values.push_back(factors_.tensor.get(h) ? factors_.value[h] : 1.0);
    }
    return values;
  }

  HeadFactors factors_;
  std::vector<at::Tensor> tensors_;
};

}  // namespace grl_ext
