// _heads_logits and _heads_gradients on the CPU: narrow heads together, in one pass over the features; each wide one by
// matrix products.
#include <torch/library.h>

#include "heads_common.h"
#include "heads_parameters.h"
#include "heads_rows.h"

namespace grl_ext::cpu {
namespace {

void fused_logits(
    std::vector<Tensor>& logits, const HeadColumns& columns, const Tensor& x, at::TensorList weight,
    const OptionalTensors& bias) {
  const int64_t n = x.size(0), d = x.size(1), k = columns.total(), step = block_rows(d);
  for (int64_t i = 0; i < columns.count(); ++i) {
    logits[columns.head(i)] = empty({n, columns.size(i)}, x.scalar_type());
  }
  dispatch_arithmetic(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Parameters<T> parameters(columns, weight, bias);
    for_each_thread(thread_count(n, d, k), n, [&](int64_t, int64_t begin, int64_t end) {
      Rows<T> features(x, d);
      HeadRows<T> out(columns, logits);
      std::vector<T> z(k * kMaxBlockRows);
      for (int64_t r = begin; r < end; r += step) {
        const int64_t rows = std::min(step, end - r);
        const T* next = features.ahead(std::min(r + rows, end - 1));
        heads_kernels<T>().logits(
            z.data(), features.read(r, rows), next, parameters.weight(), parameters.bias(), rows, d, k);
        out.write(z.data(), r, rows);
      }
    });
  });
}

std::vector<Tensor> heads_logits(const Tensor& x_, at::TensorList weight, const OptionalTensors& bias) {
  const auto division = divide(weight.size(), [&](int64_t h) { return weight[h].size(0); });
  const auto x = x_.contiguous();
  std::vector<Tensor> logits(weight.size());
  if (division.fused.count() > 0) {
    fused_logits(logits, division.fused, x, weight, bias);
  }
  for (const auto h : division.by_products) {
    logits[h] = at::linear(x, weight[h], bias.get(h));
  }
  return logits;
}

struct Gradients {
  Tensor dx;
  std::vector<Tensor> dw, db;

  // One tensor for each that is not needed: results must not share memory.
  Gradients(size_t heads, at::ScalarType dtype, const Needs& needs) : dx(empty({0}, dtype)) {
    for (size_t h = 0; h < heads; ++h) {
      dw.push_back(needs.weight(h) ? Tensor() : empty({0}, dtype));
      db.push_back(needs.bias(h) ? Tensor() : empty({0}, dtype));
    }
  }
};

template <class T>
void fused_gradients(
    Gradients& gradients, const HeadColumns& columns, at::TensorList grad_logits, const Tensor& x,
    at::TensorList weight, const std::vector<double>& factors, const Needs& needs, int64_t d) {
  const auto dtype = grad_logits[0].scalar_type();
  const int64_t n = grad_logits[0].size(0), k = columns.total(), step = block_rows(d),
                threads = thread_count(n, d, 2 * k);
  const auto parameters = needs.x() ? std::optional<Parameters<T>>(std::in_place, columns, weight, OptionalTensors())
                                    : std::nullopt;
  const auto dx_columns = columns.runs([&](int64_t head) { return factors[head] != 0; });
  ParameterGradients<T> of_parameters(gradients.dw, gradients.db, columns, threads, d, dtype, needs);
  if (needs.x()) {
    gradients.dx = empty({n, d}, dtype);  // after all others: see empty()
  }
  for_each_thread(threads, n, [&](int64_t t, int64_t begin, int64_t end) {
    Rows<T> features(x, d), gradient(gradients.dx, d);
    HeadRows<T> incoming(columns, grad_logits);
    std::vector<T> g(k * kMaxBlockRows), scaled(k * kMaxBlockRows);
    for (int64_t r = begin; r < end; r += step) {
      const int64_t rows = std::min(step, end - r);
      incoming.read(g.data(), r, rows);
      for (int64_t i = 0; needs.x() && i < columns.count(); ++i) {
        const T factor = static_cast<T>(factors[columns.head(i)]);
        for (int64_t j = columns.begin(i) * kMaxBlockRows; j < columns.begin(i + 1) * kMaxBlockRows; ++j) {
          scaled[j] = g[j] * factor;
        }
      }
      if (needs.x() || needs.any_weight()) {
        heads_kernels<T>().gradients(
            {.dx = needs.x() ? gradient.write(r) : nullptr,
             .dw = of_parameters.weight(t),
             .grad_logits = g.data(),
             .scaled = scaled.data(),
             .x = needs.any_weight() ? features.read(r, rows) : nullptr,
             .weight = parameters ? parameters->weight() : nullptr,
             .rows = rows,
             .features = d,
             .columns = k,
             .dx_columns = dx_columns.data(),
             .dx_runs = static_cast<long>(dx_columns.size()),
             .dw_columns = of_parameters.weight_columns().data(),
             .dw_runs = static_cast<long>(of_parameters.weight_columns().size())});
      }
      if (needs.x()) {
        gradient.written(r, rows);
      }
      of_parameters.end_block(t, g.data(), rows);
    }
  });
  of_parameters.total();
}

HeadsGradients heads_gradients(
    at::TensorList grad_logits_, const std::optional<Tensor>& x_, at::TensorList weight, at::ArrayRef<double> factor,
    const OptionalTensors& lambda, const c10::List<bool>& needs_) {
  const Needs needs(needs_);
  const auto heads = grad_logits_.size();
  const int64_t n = grad_logits_[0].size(0), d = !weight.empty() ? weight[0].size(1) : x_ ? x_->size(1) : 0;
  const auto factors = head_factors(factor, lambda);
  std::vector<Tensor> grad_logits;
  for (const auto& g : grad_logits_) {
    grad_logits.push_back(g.contiguous());
  }
  const auto division = divide(heads, [&](int64_t h) { return grad_logits[h].size(1); });
  Gradients gradients(heads, grad_logits[0].scalar_type(), needs);
  const auto x = needs.any_weight() ? x_->contiguous() : gradients.dx;
  bool dx_begun = division.fused.count() > 0;
  if (dx_begun) {
    dispatch_arithmetic(grad_logits[0].scalar_type(), [&](auto zero) {
      fused_gradients<decltype(zero)>(gradients, division.fused, grad_logits, x, weight, factors, needs, d);
    });
  } else if (needs.x()) {
    gradients.dx = empty({n, d}, grad_logits[0].scalar_type());
  }
  for (const auto h : division.by_products) {
    if (needs.x()) {
      add_features_gradient(gradients.dx, dx_begun, grad_logits[h], weight[h], factors[h]);
    }
    if (needs.weight(h)) {
      gradients.dw[h] = grad_logits[h].t().mm(x);
    }
    if (needs.bias(h)) {
      gradients.db[h] = grad_logits[h].sum(0);
    }
  }
  if (needs.x() && !dx_begun) {
    gradients.dx.zero_();
  }
  return {gradients.dx, gradients.dw, gradients.db};
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CPU, m) {
  m.impl("_heads_logits", heads_logits);
  m.impl("_heads_gradients", heads_gradients);
}

}  // namespace grl_ext::cpu
