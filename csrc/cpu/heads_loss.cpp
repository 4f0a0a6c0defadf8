// _heads_loss on the CPU: narrow heads together, in one sweep; each wide one by matrix products, with its loss between
// them.
#include <pytorch.h>

#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <array>
#include <cmath>

#include "../arithmetic_type.h"
#include "heads_sweep.h"

namespace grl_ext::cpu {
namespace {

// The words come from Python, which checks the same before. Here the checks keep the kernels from reading elsewhere.
void check_class(int64_t label, int64_t classes) {
  TORCH_CHECK_INDEX(label >= 0 && label < classes, "a class is out of range");
}

void check_sample_weight(double weight) {
  TORCH_CHECK_VALUE(weight >= 0 && std::isfinite(weight), "a sample weight is negative or not finite");
}

// For probabilities that were rounded. grl_ext/_checks.py has the same.
constexpr double kProbabilityTolerance = 0.02;

// A row of a cross entropy's targets.
template <class T>
void check_probabilities(const T* row, int64_t size) {
  double sum = 0;
  bool in_range = true;
  for (int64_t k = 0; k < size; ++k) {
    in_range = in_range && row[k] >= -kProbabilityTolerance && row[k] <= 1 + kProbabilityTolerance;
    sum += row[k];
  }
  TORCH_CHECK_VALUE(
      in_range && (size == 1 || std::abs(sum - 1) <= kProbabilityTolerance), "targets are not probabilities");
}

// The heads' targets, weights and losses.
template <class T>
class Losses {
 public:
  // `of_total`: whether gradients are those of the total loss, in which each head's has its weight.
  Losses(
      at::TensorList weight, const HeadsOptions& options, const std::vector<double>& factors, int64_t threads,
      bool of_total)
      : factors_(factors), of_total_(of_total), sums_(threads * weight.size()) {
    heads_.reserve(weight.size());
    const auto loss_weights = options.loss_weight ? options.loss_weight->to(at::kDouble).contiguous() : Tensor();
    for (size_t h = 0; h < weight.size(); ++h) {
      const auto& target = options.targets[h];
      Target head;
      head.size = weight[h].size(0);
      head.kind = options.kind[h];
      head.smoothing = options.label_smoothing[h];
      head.ignore_index = options.ignore_index[h];
      head.loss_weight = options.loss_weight ? loss_weights.template const_data_ptr<double>()[h] : 1.0;
      if (target.scalar_type() == at::kLong) {
        head.labels = target.template const_data_ptr<int64_t>();
      } else {
        head.values = target.template const_data_ptr<T>();
      }
      const auto weights = options.sample_weight.get(h);
      (weights && weights->dim() == 2 ? head.entry_weight : head.sample_weight) = pointer(weights);
      head.class_weight = pointer(options.class_weight.get(h));
      if (head.kind == kBinaryCrossEntropy) {
        check_indicators(head, target.size(0));
      }
      const auto total = total_weight(head, target.size(0));
      head.norm = options.mean ? total : 1.0;
      heads_.push_back(head);
    }
  }

  // Adds a head's losses in a block of rows to the thread's sum. Writes the gradient of its logits, and the same times
  // the head's factor. All three matrices have their columns kMaxBlockRows apart.
  void block(int64_t thread, int64_t h, int64_t row, int64_t rows, const T* logits, T* grad_logits, T* scaled) {
    const Target& head = heads_[h];
    std::array<Integer<T>, kMaxBlockRows> labels{};
    std::array<T, kMaxBlockRows> row_weights{};
    for (int64_t i = 0; i < rows && head.norm != 0; ++i) {  // without a norm no row counts
      row_weights[i] = head.sample_weight ? head.sample_weight[row + i] : T(1);
      if (head.labels) {
        const auto label = head.labels[row + i];
        labels[i] = label == head.ignore_index ? 0 : static_cast<Integer<T>>(label);
        row_weights[i] = label == head.ignore_index ? T(0) : row_weights[i];
      }
    }
    const auto columns_of = [&](const T* matrix) {
      std::vector<T> columns(matrix ? head.size * kMaxBlockRows : 0);
      if (matrix) {
        to_columns(columns.data(), matrix + row * head.size, rows, head.size);
      }
      return columns;
    };
    // Without a norm nothing counts, neither a row nor an entry.
    const auto values = columns_of(head.values),
               entry_weights = columns_of(head.norm == 0 ? nullptr : head.entry_weight);
    const HeadBlock<T> block{
        .logits = logits,
        .grad_logits = grad_logits,
        .scaled = scaled,
        .rows = static_cast<long>(rows),
        .columns = static_cast<long>(head.size),
        .label = head.labels ? labels.data() : nullptr,
        .target = values.data(),
        .row_weight = row_weights.data(),
        .entry_weight = entry_weights.empty() ? nullptr : entry_weights.data(),
        .class_weight = head.class_weight,
        .smoothing = head.smoothing,
        .grad_factor = head.norm == 0 ? 0.0 : (of_total_ ? head.loss_weight : 1.0) / head.norm,
        .factor = factors_[h]};
    const auto& kernels = heads_kernels<T>();
    const auto loss = head.kind == kSquaredError ? kernels.squared_error
        : head.kind == kBinaryCrossEntropy       ? kernels.binary_cross_entropy
                                                 : kernels.cross_entropy;
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
      const double of_head = heads_[h].norm == 0 ? 0.0 : sum / heads_[h].norm;
      head_losses.template data_ptr<T>()[h] = static_cast<T>(of_head);
      loss += heads_[h].loss_weight * of_head;
    }
    auto total = empty({}, dtype);
    *total.template mutable_data_ptr<T>() = static_cast<T>(loss);
    return {total, head_losses};
  }

 private:
  // What one head's loss is computed from.
  struct Target {
    int64_t size = 0;
    const int64_t* labels = nullptr;  // classes (rows); or else
    const T* values = nullptr;  // probabilities or values (rows, size)
    const T* sample_weight = nullptr;  // of rows
    const T* entry_weight = nullptr;  // (rows, size), in place of it
    const T* class_weight = nullptr;
    int64_t kind = kCrossEntropy;
    double smoothing = 0, loss_weight = 1, norm = 1;
    int64_t ignore_index = 0;
  };

  static const T* pointer(const std::optional<Tensor>& tensor) {
    return tensor ? tensor->template const_data_ptr<T>() : nullptr;
  }

  // The sum of the weights of rows, or of their outputs. Needed before the first gradient, which is divided by it.
  // Refuses invalid targets and weights. The weight of a class that no row has is not read: it may be infinite.
  static double total_weight(const Target& head, int64_t rows) {
    if (head.entry_weight) {
      return total_entry_weight(head, rows);
    }
    const int64_t classes = classes_of(head.size);
    const bool weighted = head.sample_weight || (head.labels && head.class_weight);
    int64_t count = 0;
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) {
      double weight = head.sample_weight ? head.sample_weight[r] : 1.0;
      check_sample_weight(weight);
      if (head.values && head.kind == kCrossEntropy && weight != 0) {
        check_probabilities(head.values + r * head.size, head.size);
      }
      if (head.labels) {
        const auto label = head.labels[r];
        if (label == head.ignore_index) {
          continue;
        }
        check_class(label, classes);
        weight *= head.class_weight && weight != 0 ? head.class_weight[label] : 1.0;
      }
      ++count;
      total += weighted ? weight : 0.0;
    }
    total = weighted ? total : static_cast<double>(count);
    return is_by_output(head.kind) ? total * static_cast<double>(head.size) : total;
  }

  static double total_entry_weight(const Target& head, int64_t rows) {
    double total = 0;
    for (int64_t i = 0; i < rows * head.size; ++i) {
      check_sample_weight(head.entry_weight[i]);
      total += head.entry_weight[i];
    }
    return total;
  }

  static void check_indicators(const Target& head, int64_t rows) {
    for (int64_t i = 0; i < rows * head.size; ++i) {
      const bool counts = head.entry_weight ? head.entry_weight[i] != 0
                                            : !head.sample_weight || head.sample_weight[i / head.size] != 0;
      TORCH_CHECK_VALUE(!counts || (head.values[i] >= 0 && head.values[i] <= 1), "a target is not in [0, 1]");
    }
  }

  const std::vector<double>& factors_;
  const bool of_total_;
  std::vector<Target> heads_;
  std::vector<double> sums_;  // per thread and head
};

HeadsLossResult heads_loss(
    const Tensor& x_, at::TensorList weight, const OptionalTensors& bias, at::TensorList targets,
    const OptionalTensors& sample_weight, const OptionalTensors& class_weight, at::ArrayRef<double> factor,
    const OptionalTensors& lambda, const std::optional<Tensor>& loss_weight, at::IntArrayRef kind,
    at::ArrayRef<double> label_smoothing, at::IntArrayRef ignore_index, bool mean, bool with_grad_logits,
    const c10::List<bool>& needs) {
  const HeadsOptions options{
      .targets = targets.vec(),
      .sample_weight = sample_weight,
      .class_weight = class_weight,
      .loss_weight = loss_weight,
      .kind = kind.vec(),
      .label_smoothing = label_smoothing.vec(),
      .ignore_index = ignore_index.vec(),
      .mean = mean};
  const auto x = x_.contiguous();
  const int64_t n = x.size(0), d = x.size(1);
  const Division division(weight.size(), [&](size_t h) { return weight[h].size(0); });
  Gradients gradients(needs, head_factors(factor, lambda), x.scalar_type());
  TORCH_CHECK_VALUE(!with_grad_logits || !gradients.needs.any(), "with_grad_logits goes without other gradients");
  int64_t columns = 0;
  for (const auto& matrix : weight) {
    columns += matrix.size(0);
  }
  const auto threads = thread_count(n, d, columns, /*passes=*/gradients.needs.any() ? 3 : 1);
  std::vector<Tensor> logits(weight.size()), grad_logits;
  for (size_t h = 0; with_grad_logits && h < weight.size(); ++h) {
    grad_logits.push_back(empty({n, weight[h].size(0)}, arithmetic_type(x.scalar_type())));
  }
  return dispatch_arithmetic(x.scalar_type(), [&](auto zero) -> HeadsLossResult {
    using T = decltype(zero);
    Losses<T> losses(weight, options, gradients.factors, threads, /*of_total=*/!with_grad_logits);
    if (division.swept.count() > 0) {
      const Parameters<T> parameters(division.swept, weight, bias);
      make_logits(logits, division.swept, x);
      Sweep<T> sweep{division.swept, n, d, threads, x, &parameters, logits};
      sweep.loss = [&](auto... block) { losses.block(block...); };
      sweep.grad_logits = grad_logits;
      sweep.gradients = gradients.needs.any() ? &gradients : nullptr;
      sweep.run();
    }
    for (const auto h : division.by_products) {  // with the losses between the products
      logits[h] = at::linear(x, weight[h], bias.get(h));
      const auto own = with_grad_logits ? grad_logits[h] : at::empty_like(logits[h]);
      HeadColumns only;
      only.add(0, weight[h].size(0));
      Sweep<T> sweep{only, n, /*features=*/0, threads, x};
      sweep.logits = logits[h];
      sweep.loss = [&](int64_t thread, int64_t, auto... block) { losses.block(thread, h, block...); };
      sweep.grad_logits = own;
      sweep.run();
      gradients.add_products(h, own, x, weight);
    }
    gradients.finish(n, d);
    auto [loss, head_losses] = losses.total();
    return {std::move(loss),        std::move(head_losses),      std::move(logits),        std::move(grad_logits),
            std::move(gradients.x), std::move(gradients.weight), std::move(gradients.bias)};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CPU, m) {
  m.impl("_heads_loss", heads_loss);
}

}  // namespace grl_ext::cpu
