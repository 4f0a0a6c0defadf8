// The matrix products of all heads together, and the buffers that they read and write.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
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
      at::mm_out(gradients.dx, scaled_, weight_);
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

// One wide head alone has no columns to lie beside: its products read and write the tensors themselves.
inline void logits_of_one_head(Tensor& logits, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  bias.defined() ? at::addmm_out(logits, bias, x, weight.t()) : at::mm_out(logits, x, weight.t());
}

// dx = factor * lambda * (g W). A number that the host knows rides in the product. One on the device scales whatever is
// less to move: dx itself, or g, with W in a copy that is zero where the number is (a head that is off adds nothing,
// though g and W be infinite).
template <typename T>
void feature_gradient_of_one_head(
    GradientTensors& gradients, const Tensor& g, const Tensor& weight, double factor,
    const std::optional<Tensor>& lambda, const Sizes& sizes, const std::vector<Heads<T>>& all_heads, Stream& stream) {
  auto& dx = gradients.dx;
  if (!lambda || !lambda->is_cuda()) {
    const double known = lambda ? factor * lambda->item<double>() : factor;
    known == 0 ? dx.zero_() : at::addmm_out(dx, dx, g, weight, /*beta=*/0, /*alpha=*/known);
    return;
  }
  if (dx.numel() <= g.numel() + weight.numel()) {
    static const auto scale_in_place = c10::Dispatcher::singleton()
                                           .findSchemaOrThrow("grl_ext::_scale_", "")
                                           .typed<void(Tensor&, double, const std::optional<Tensor>&)>();
    at::mm_out(dx, g, weight);
    return scale_in_place.call(dx, factor, lambda);
  }
  auto of_features = gradients;
  of_features.dw = of_features.db = {};
  HeadsProducts<T> products(sizes, all_heads, g.options());
  products.prepare_gradients(of_features, stream);
  gather_gradients(products.buffers(), all_heads, stream);
  products.write_gradients(of_features, Tensor());
}

}  // namespace grl_ext
