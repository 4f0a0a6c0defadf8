// The matrix products of all heads together, and the buffers that they read and write.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include "heads_products_launches.cuh"
#include "heads_tensors.h"

namespace grl_ext {

template <typename T>
class HeadsProducts {
 public:
  HeadsProducts(const Sizes& sizes, const std::vector<Heads<T>>& all_heads, const at::TensorOptions& options)
      : sizes_(sizes), all_heads_(all_heads), options_(options) {}

  Products<T> buffers() const {
    return {sizes_.rows,    sizes_.features, sizes_.columns, pitch_,          data<T>(weight_),
            data<T>(bias_), data<T>(z_),     data<T>(g_),    data<T>(scaled_)};
  }

  // z of all heads.
  void compute_logits(const Tensor& x, Stream& stream) {
    bias_ = at::empty({pitch_}, options_);
    gather(stream);
    z_ = at::addmm(bias_, x, weight_.t());
  }

  // Makes room for what the gradients are computed from, and leaves out of dx the heads whose factor is 0. After
  // compute_logits, which reads the whole weight.
  void prepare_gradients(const GradientTensors& gradients, Stream& stream) {
    const auto any = [](const std::vector<Tensor>& tensors) {
      return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return tensor.numel() > 0; });
    };
    if (any(gradients.dw) || any(gradients.db)) {
      g_ = at::empty({sizes_.rows, pitch_}, options_);
    }
    if (gradients.dx.numel() > 0) {
      scaled_ = at::empty({sizes_.rows, pitch_}, options_);
      if (!weight_.defined()) {
        gather(stream);
      }
      zero_weights(buffers(), all_heads_, stream);
    }
  }

  // Computes the gradients from g, scaled and weight, and copies each head's part into its tensor.
  void write_gradients(GradientTensors& gradients, const Tensor& x) const {
    if (scaled_.defined()) {
      gradients.dx = at::mm(scaled_, weight_);
    }
    write_rows(gradients.dw, [&] { return at::mm(g_.t(), x); });
    write_rows(gradients.db, [&] { return at::sum(g_, 0); });
  }

 private:
  void gather(Stream& stream) {
    weight_ = at::empty({pitch_, sizes_.features}, options_);
    gather_weights(buffers(), all_heads_, stream);
  }

  // all() computes the rows of all heads, one head after the other.
  template <class All>
  void write_rows(std::vector<Tensor>& heads, const All& all) const {
    Tensor rows;
    int64_t begin = 0;
    for (size_t h = 0; h < heads.size(); ++h) {
      if (heads[h].numel() > 0) {
        rows = rows.defined() ? rows : all();
        heads[h].copy_(rows.narrow(0, begin, sizes_.heads[h]));
      }
      begin += sizes_.heads[h];
    }
  }

  const Sizes& sizes_;
  const std::vector<Heads<T>>& all_heads_;
  const at::TensorOptions options_;
  const int pitch_ = static_cast<int>(round_up(sizes_.columns, kProductColumns));
  Tensor weight_, bias_, z_, g_, scaled_;  // as in Products; undefined where not needed
};

}  // namespace grl_ext
