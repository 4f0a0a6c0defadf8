// _heads_loss on the CPU: logits, losses and all gradients block by block, while a block of features is in the cache.
// Heads too wide for that are computed by matrix products, with the losses between them.
#include <torch/library.h>

#include <array>

#include "../heads_checks.h"
#include "heads_common.h"
#include "heads_parameters.h"
#include "heads_rows.h"

namespace grl_ext::cpu {
namespace {

// The heads' targets, weights and losses.
template <class T>
class Losses {
 public:
  Losses(at::TensorList weight, const HeadsOptions& options, const std::vector<double>& factors, int64_t threads)
      : factors_(factors), sums_(threads * weight.size()) {
    heads_.reserve(weight.size());
    const auto loss_weights = options.loss_weight ? options.loss_weight->to(at::kDouble).contiguous() : Tensor();
    for (size_t h = 0; h < weight.size(); ++h) {
      const auto& target = options.targets[h];
      Head head;
      head.size = weight[h].size(0);
      head.squared = options.kind[h] == kSquaredError;
      head.smoothing = options.label_smoothing[h];
      head.ignore_index = options.ignore_index[h];
      head.loss_weight = options.loss_weight ? loss_weights.template const_data_ptr<double>()[h] : 1.0;
      if (target.scalar_type() == at::kLong) {
        head.labels = target.template const_data_ptr<int64_t>();
      } else {
        head.values = target.template const_data_ptr<T>();
      }
      head.sample_weight = pointer(options.sample_weight.get(h));
      head.class_weight = pointer(options.class_weight.get(h));
      const auto total = total_weight(head, h, target.size(0));
      head.norm = !options.mean ? 1.0 : head.squared ? total * static_cast<double>(head.size) : total;
      heads_.push_back(head);
    }
  }

  // Adds a head's losses in a block of rows to the thread's sum. Writes the gradient of its logits, and the same times
  // the head's factor. All three matrices have their columns kMaxBlockRows apart.
  void block(int64_t thread, int64_t h, int64_t row, int64_t rows, const T* logits, T* grad_logits, T* scaled) {
    const Head& head = heads_[h];
    std::array<Integer<T>, kMaxBlockRows> labels{};
    std::array<T, kMaxBlockRows> row_weights{};
    for (int64_t i = 0; i < rows; ++i) {
      row_weights[i] = head.sample_weight ? head.sample_weight[row + i] : T(1);
      if (head.labels) {
        const auto label = head.labels[row + i];
        labels[i] = label == head.ignore_index ? 0 : static_cast<Integer<T>>(label);
        row_weights[i] = label == head.ignore_index ? T(0) : row_weights[i];
      }
    }
    std::vector<T> values(head.values ? head.size * kMaxBlockRows : 0);
    if (head.values) {
      to_columns(values.data(), head.values + row * head.size, rows, head.size);
    }
    const HeadBlock<T> block{
        .logits = logits,
        .grad_logits = grad_logits,
        .scaled = scaled,
        .rows = static_cast<long>(rows),
        .columns = static_cast<long>(head.size),
        .label = head.labels ? labels.data() : nullptr,
        .target = values.data(),
        .row_weight = row_weights.data(),
        .class_weight = head.class_weight,
        .smoothing = head.smoothing,
        .grad_factor = head.norm == 0 ? 0.0 : head.loss_weight / head.norm,
        .factor = factors_[h]};
    const auto loss = head.squared ? heads_kernels<T>().squared_error : heads_kernels<T>().cross_entropy;
    sums_[thread * heads_.size() + h] += loss(block);
  }

  // (loss, head_losses)
  std::pair<Tensor, Tensor> total() const {
    constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
    auto head_losses = empty({static_cast<int64_t>(heads_.size())}, dtype);
    double loss = 0;
    for (size_t h = 0; h < heads_.size(); ++h) {
      double sum = 0;
      for (size_t i = h; i < sums_.size(); i += heads_.size()) {
        sum += sums_[i];
      }
      const double own = heads_[h].norm == 0 ? 0.0 : sum / heads_[h].norm;
      head_losses.template data_ptr<T>()[h] = static_cast<T>(own);
      loss += heads_[h].loss_weight * own;
    }
    auto total = empty({}, dtype);
    *total.template mutable_data_ptr<T>() = static_cast<T>(loss);
    return {total, head_losses};
  }

 private:
  struct Head {
    int64_t size = 0;
    const int64_t* labels = nullptr;  // classes (rows); or else
    const T* values = nullptr;  // probabilities or values (rows, size)
    const T* sample_weight = nullptr;
    const T* class_weight = nullptr;
    bool squared = false;
    double smoothing = 0, loss_weight = 1, norm = 1;
    int64_t ignore_index = 0;
  };

  static const T* pointer(const std::optional<Tensor>& tensor) {
    return tensor ? tensor->template const_data_ptr<T>() : nullptr;
  }

  // The sum of the rows' weights. Needed before the first gradient, which is divided by it. Refuses invalid targets and
  // weights.
  static double total_weight(const Head& head, size_t h, int64_t rows) {
    const int64_t classes = classes_of(head.size);
    const auto takes_part = [&](int64_t r) { return !head.labels || head.labels[r] != head.ignore_index; };
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (head.labels) {
        check_class(head.labels[r], h, classes, head.ignore_index);
      }
      count += takes_part(r);
    }
    if (!head.sample_weight && !(head.labels && head.class_weight)) {
      return static_cast<double>(count);
    }
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const double weight = head.sample_weight ? head.sample_weight[r] : 1.0;
      check_sample_weight(weight, h);
      if (takes_part(r)) {
        total += head.labels && head.class_weight ? weight * head.class_weight[head.labels[r]] : weight;
      }
    }
    return total;
  }

  const std::vector<double>& factors_;
  std::vector<Head> heads_;
  std::vector<double> sums_;  // per thread and head
};

struct Result {
  std::vector<Tensor> logits;
  Tensor dx;
  std::vector<Tensor> dw, db;
};

// The heads that the fused kernels take, in one pass over the features.
template <class T>
void fused(
    Result& result, Losses<T>& losses, const HeadColumns& columns, int64_t threads, const Tensor& x,
    at::TensorList weight, const OptionalTensors& bias, const std::vector<double>& factors, const Needs& needs) {
  const int64_t n = x.size(0), d = x.size(1), k = columns.total(), step = block_rows(d);
  const Parameters<T> parameters(columns, weight, bias);
  const auto dx_columns = columns.runs([&](int64_t head) { return factors[head] != 0; });
  for (int64_t i = 0; i < columns.count(); ++i) {
    result.logits[columns.head(i)] = empty({n, columns.size(i)}, x.scalar_type());
  }
  ParameterGradients<T> of_parameters(result.dw, result.db, columns, threads, d, x.scalar_type(), needs);
  if (needs.x()) {
    result.dx = empty(x.sizes(), x.scalar_type());  // after all others: see empty()
  }
  for_each_thread(threads, n, [&](int64_t t, int64_t begin, int64_t end) {
    Rows<T> features(x, d), gradient(result.dx, d);
    HeadRows<T> out(columns, result.logits);
    std::vector<T> z(k * kMaxBlockRows), g(k * kMaxBlockRows), scaled(k * kMaxBlockRows);
    for (int64_t r = begin; r < end; r += step) {
      const int64_t rows = std::min(step, end - r);
      const T* block = features.read(r, rows);
      const T* next = features.ahead(std::min(r + rows, end - 1));
      heads_kernels<T>().logits(z.data(), block, next, parameters.weight(), parameters.bias(), rows, d, k);
      out.write(z.data(), r, rows);
      for (int64_t i = 0; i < columns.count(); ++i) {
        const int64_t at = columns.begin(i) * kMaxBlockRows;
        losses.block(t, columns.head(i), r, rows, z.data() + at, g.data() + at, scaled.data() + at);
      }
      if (needs.x() || needs.any_weight()) {
        heads_kernels<T>().gradients(
            {.dx = needs.x() ? gradient.write(r) : nullptr,
             .dw = of_parameters.weight(t),
             .grad_logits = g.data(),
             .scaled = scaled.data(),
             .x = block,
             .weight = parameters.weight(),
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

// One head by matrix products, with its losses between them.
template <class T>
void by_products(
    Result& result, bool& dx_begun, Losses<T>& losses, int64_t h, int64_t threads, const Tensor& x,
    const Tensor& weight, const std::optional<Tensor>& bias, double factor, const Needs& needs) {
  const int64_t n = x.size(0), k = weight.size(0);
  const auto logits = at::linear(x, weight, bias);
  auto grad_logits = at::empty_like(logits);
  for_each_thread(threads, n, [&](int64_t t, int64_t begin, int64_t end) {
    Rows<T> in(logits, k), out(grad_logits, k);
    std::vector<T> z(k * kMaxBlockRows), g(k * kMaxBlockRows), scaled(k * kMaxBlockRows);
    for (int64_t r = begin; r < end; r += kMaxBlockRows) {
      const int64_t rows = std::min<int64_t>(kMaxBlockRows, end - r);
      to_columns(z.data(), in.read(r, rows), rows, k);
      losses.block(t, h, r, rows, z.data(), g.data(), scaled.data());
      to_rows(out.write(r), g.data(), rows, k);
      out.written(r, rows);
    }
  });
  result.logits[h] = logits;
  if (needs.x()) {
    add_features_gradient(result.dx, dx_begun, grad_logits, weight, factor);
  }
  if (needs.weight(h)) {
    result.dw[h] = grad_logits.t().mm(x);
  }
  if (needs.bias(h)) {
    result.db[h] = grad_logits.sum(0);
  }
}

HeadsLossResult heads_loss(
    const Tensor& x_, at::TensorList weight, const OptionalTensors& bias, at::TensorList targets,
    const OptionalTensors& sample_weight, const OptionalTensors& class_weight, at::ArrayRef<double> factor,
    const OptionalTensors& lambda, const std::optional<Tensor>& loss_weight, at::IntArrayRef kind,
    at::ArrayRef<double> label_smoothing, at::IntArrayRef ignore_index, bool mean, const c10::List<bool>& needs_) {
  const HeadsOptions options{targets.vec(), sample_weight,         class_weight,       {},  {}, loss_weight,
                             kind.vec(),    label_smoothing.vec(), ignore_index.vec(), mean};
  const auto x = x_.contiguous();
  const Needs needs(needs_);
  const auto heads = weight.size();
  const auto division = divide(heads, [&](int64_t h) { return weight[h].size(0); });
  const auto factors = head_factors(factor, lambda);
  int64_t columns = 0;
  for (const auto& matrix : weight) {
    columns += matrix.size(0);
  }
  const int64_t threads = thread_count(x.size(0), x.size(1), (needs.any() ? 3 : 1) * columns);
  const auto none = [&] {
    return empty({0}, x.scalar_type());
  };  // a new tensor each time: results must not share memory
  Result result{std::vector<Tensor>(heads), needs.x() ? Tensor() : none(), {}, {}};
  result.dw.reserve(heads);
  result.db.reserve(heads);
  for (size_t h = 0; h < heads; ++h) {
    result.dw.push_back(needs.weight(h) ? Tensor() : none());
    result.db.push_back(needs.bias(h) ? Tensor() : none());
  }
  return dispatch_arithmetic(x.scalar_type(), [&](auto zero) -> HeadsLossResult {
    Losses<decltype(zero)> losses(weight, options, factors, threads);
    bool dx_begun = division.fused.count() > 0;
    if (dx_begun) {
      fused(result, losses, division.fused, threads, x, weight, bias, factors, needs);
    } else if (needs.x()) {
      result.dx = empty(x.sizes(), x.scalar_type());
    }
    for (const auto h : division.by_products) {
      by_products(result, dx_begun, losses, h, threads, x, weight[h], bias.get(h), factors[h], needs);
    }
    if (needs.x() && !dx_begun) {
      result.dx.zero_();
    }
    auto [loss, head_losses] = losses.total();
    return {std::move(loss),      std::move(head_losses), std::move(result.logits),
            std::move(result.dx), std::move(result.dw),   std::move(result.db)};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CPU, m) {
  m.impl("_heads_loss", heads_loss);
}

}  // namespace grl_ext::cpu
