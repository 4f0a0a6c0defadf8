// What the heads' kernels are compared with: plain loops in double precision, how far from them the kernels may be, and
// memory between guards.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "heads_products_launches.cuh"
#include "heads_sweep_launches.cuh"

namespace heads_oracle {

using namespace grl_ext;

struct HeadCase {
  int size;
  TargetKind kind = TargetKind::kClasses;
  bool sample_weight = false;
  bool of_entries = false;  // the sample weights
  bool class_weight = false;
  double smoothing = 0;
  double loss_weight = 1;
  double lambda = NAN;  // NaN: a predictor
  bool bias = true;
  bool all_ignored = false;  // no valid row: by ignore_index, or by weights of 0
  bool needs_weight = true;
  bool needs_bias = true;
  bool infinite_weight = false;  // its matrix holds infinities and NaN
  double absent_weight = 0;  // not 0: the class weight of the last class, which no row has
  bool masked = false;  // the logits of the last class are -inf, by its bias

  double factor() const { return std::isnan(lambda) ? 1 : -lambda; }
  int classes() const { return std::max(2, size); }
};

// How an operator is run a second time, for the same bits: into other memory, or as a CUDA graph does it, by the same
// launches over what the first run has left in memory.
enum class Again { kElsewhere, kReplayed, kNever };

struct Case {
  int64_t rows;
  int features;
  std::vector<HeadCase> heads;
  HeadsDevice device = {3, 227 << 10};
  bool needs_dx = true;
  bool mean = true;
  bool on_device = false;  // lambda and the loss weights
  bool nan_rows =
      false;  // some rows of x are NaN; they have weight 0 in every head, and their targets are NaN where they can be
  int offset = 0;  // elements that x begins past an aligned address
  double weights = 1;  // how large the sample weights are
  Again again = Again::kElsewhere;
};

inline bool is_by_output(const HeadCase& head) {
  return head.kind == TargetKind::kValues || head.kind == TargetKind::kIndicators;
}

inline std::vector<HeadCase> heads_of(const std::vector<int>& sizes) {
  std::vector<HeadCase> heads;
  for (const int size : sizes) {
    heads.push_back({size});
  }
  return heads;
}

inline std::string describe(const Case& c) {
  std::string text = "N " + std::to_string(c.rows) + ", D " + std::to_string(c.features) + ", " +
      std::to_string(c.device.sm_count) + " multiprocessors, " + std::to_string(c.device.shared_bytes) +
      " bytes of shared memory" + (c.mean ? "" : ", sum") + (c.needs_dx ? "" : ", no dx") +
      (c.on_device ? ", numbers on the device" : "") + (c.offset ? ", misaligned" : "") +
      (c.nan_rows ? ", rows of NaN" : "");
  for (const HeadCase& h : c.heads) {
    const char* const kinds[] = {"none", "classes", "probabilities", "values", "indicators"};
    text += "\n  head of " + std::to_string(h.size) + " with " + kinds[static_cast<int>(h.kind)] +
        (h.sample_weight ? ", sample weights" : "") + (h.of_entries ? " of entries" : "") +
        (h.class_weight ? ", class weights" : "") + (h.smoothing > 0 ? ", smoothed" : "") +
        (h.bias ? "" : ", no bias") + (h.all_ignored ? ", ignored" : "") + (h.needs_weight ? "" : ", frozen weight") +
        (h.needs_bias ? "" : ", frozen bias") + (h.infinite_weight ? ", infinite" : "") + (h.masked ? ", masked" : "") +
        (h.absent_weight != 0 ? ", absent class of weight " + std::to_string(h.absent_weight) : "") + ", lambda " +
        std::to_string(h.lambda);
  }
  return text;
}

// Repeatable numbers in [-1, 1).
class RandomNumbers {
 public:
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<int64_t>(state_ >> 11) - (int64_t{1} << 52)) * 0x1p-52;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>((next() + 1) / 2 * static_cast<double>(n)); }

 private:
  uint64_t state_ = 12345;
};

template <typename T>
double value(const T& x) {
  return Arithmetic<T>::widen(x);
}

template <typename T>
T element(double x) {
  return Arithmetic<T>::narrow(static_cast<typename Arithmetic<T>::type>(x));
}

// n elements between two guards; those of an output begin as the guard's pattern too.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t n, int offset = 0)
      : n_(n), begin_(kGuard + offset), bytes_((begin_ + n + kGuard) * sizeof(T) + 16) {
    std::memset(bytes_.data(), kPattern, bytes_.size());
    base_ = reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(bytes_.data()), 16));
  }
  T* data() { return reinterpret_cast<T*>(base_) + begin_; }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return n_; }
  bool guards_hold() {
    bool hold = true;
    for (const char& byte : bytes_) {
      const char* const end = reinterpret_cast<char*>(data() + n_);
      hold &= (&byte >= reinterpret_cast<char*>(data()) && &byte < end) || byte == static_cast<char>(kPattern);
    }
    return hold;
  }
  // As if nobody had written to them.
  void forget() { std::memset(bytes_.data(), kPattern, bytes_.size()); }
  bool same_bits(Guarded& other) { return std::memcmp(data(), other.data(), n_ * sizeof(T)) == 0; }

 private:
  static constexpr int kGuard = 16;
  static constexpr int kPattern = 0xa5;
  int64_t n_;
  int64_t begin_;
  std::vector<char> bytes_;
  char* base_;
};

// What the loops say, and how far from it the kernels may be before they round to the tensors' type.
struct Sums {
  std::vector<double> sum, error;
  explicit Sums(int64_t n) : sum(n), error(n) {}
  void add(int64_t i, double term, double error_of_term) {
    sum[i] += term;
    error[i] += error_of_term;
  }
};

// Half a unit in the last place of the tensors' type and of the type they are computed in.
template <typename T>
constexpr double kRounding = 0x1p-53;
template <>
constexpr double kRounding<float> = 0x1p-24;
template <>
constexpr double kRounding<__half> = 0x1p-11;
template <>
constexpr double kRounding<__nv_bfloat16> = 0x1p-8;

// What the gradient of a logit may lose where the matrix units multiply with it, as two numbers of the tensors' type.
template <typename T>
constexpr double kSplitting = kRounding<T> * kRounding<T>;

// Whether a result is what is wanted, which may be an infinity or NaN.
inline bool near(double got, double want, double tolerance) {
  return std::isfinite(want) ? std::fabs(got - want) <= tolerance
                             : got == want || (std::isnan(got) && std::isnan(want));
}

// A smallest step of its own for results that are subnormal halves.
template <typename T>
constexpr double kSmallest = std::is_same_v<T, __half> ? 0x1p-25 : 0;

// The heads' losses and the gradient of the total for the logits, with what each inherits from an error of `z_error` in
// the logits.
struct WantedLoss {
  std::vector<double> head, head_error;
  double total = 0, total_error = 0;
  std::vector<double> g, g_error;  // (rows, columns)
};

// The inputs of a case, as the operators get them, and their loops.
template <typename T>
struct Inputs {
  using A = typename Arithmetic<T>::type;
  static constexpr int64_t kIgnoreIndex = -100;

  Case c;
  int count;
  int columns = 0;
  std::vector<int> head_of, begin;
  Guarded<T> x;
  std::vector<Guarded<T>> weight, bias, grad_logits;
  std::vector<std::vector<int64_t>> classes;
  std::vector<std::vector<A>> dense, sample_weight, class_weight;
  std::vector<double> half_lambda;  // of each head, as the device holds it: for every second one in float
  std::vector<float> half_lambda_float;
  std::vector<double> loss_weight;  // of the heads, or one for all

  explicit Inputs(const Case& c) : c(c), count(static_cast<int>(c.heads.size())), x(c.rows * c.features, c.offset) {
    RandomNumbers numbers;
    for (int64_t i = 0; i < c.rows * c.features; ++i) {
      x[i] = element<T>(c.nan_rows && i / c.features % 3 == 1 ? NAN : numbers.next());
    }
    for (int h = 0; h < count; ++h) {
      const HeadCase& head = c.heads[h];
      begin.push_back(columns);
      columns += head.size;
      head_of.insert(head_of.end(), head.size, h);
      weight.emplace_back(int64_t{head.size} * c.features, h % 2);  // each at its own alignment
      bias.emplace_back(head.size, 1);
      grad_logits.emplace_back(c.rows * head.size);
      for (int64_t i = 0; i < weight[h].size(); ++i) {
        weight[h][i] = element<T>(numbers.next() * 3 / std::sqrt(c.features));
      }
      if (head.infinite_weight) {
        weight[h][0] = element<T>(INFINITY);
        weight[h][weight[h].size() - 1] = element<T>(NAN);
      }
      for (int k = 0; k < head.size; ++k) {
        bias[h][k] = element<T>(head.masked && k + 1 == head.size ? -INFINITY : numbers.next());
      }
      for (int64_t i = 0; i < grad_logits[h].size(); ++i) {
        grad_logits[h][i] = element<T>(numbers.next());
      }
      make_targets(head, numbers);
      half_lambda.push_back(head.lambda / 2);
      half_lambda_float.push_back(static_cast<float>(head.lambda / 2));
      loss_weight.push_back(head.loss_weight);
    }
    if (std::equal(loss_weight.begin() + 1, loss_weight.end(), loss_weight.begin())) {
      loss_weight.resize(1);
    }
    begin.push_back(columns);
  }

  bool is_nan_row(int64_t r) const { return c.nan_rows && r % 3 == 1; }

  void make_targets(const HeadCase& head, RandomNumbers& numbers) {
    std::vector<int64_t> labels;
    std::vector<A> values, weights, per_class;
    for (int64_t r = 0; r < c.rows; ++r) {
      const bool out = head.all_ignored || (is_nan_row(r) && !head.sample_weight);
      labels.push_back(
          out || numbers.below(5) == 0 ? kIgnoreIndex : numbers.below(head.classes() - (head.absent_weight != 0)));
      const bool zero = head.all_ignored || is_nan_row(r) || numbers.below(4) == 0;
      for (int k = 0; k < (head.of_entries ? head.size : 1); ++k) {
        const bool zero_here = zero || (k > 0 && numbers.below(4) == 0);
        weights.push_back(static_cast<A>(zero_here ? 0 : c.weights * (1.5 + numbers.next())));
      }
      double left = 1;
      for (int k = 0; k < head.size; ++k) {
        double v = numbers.next();
        if (head.kind == TargetKind::kProbabilities) {
          const bool absent = head.absent_weight != 0 && k + 1 == head.size;
          v = absent ? 0 : k + 1 == head.size && head.size > 1 ? left : left * (v + 1) / 2;
          left -= v;
        } else if (head.kind == TargetKind::kIndicators) {
          v = numbers.below(2) == 0 ? (v + 1) / 2 : v > 0;
        }
        values.push_back(static_cast<A>(is_nan_row(r) ? NAN : v));
      }
    }
    for (int k = 0; k < head.classes(); ++k) {
      per_class.push_back(static_cast<A>(k == 2 ? 0.0 : 1.25 + numbers.next()));  // one class counts for nothing
    }
    if (head.absent_weight != 0) {
      per_class.back() = static_cast<A>(head.absent_weight);
    }
    classes.push_back(labels);
    dense.push_back(values);
    sample_weight.push_back(weights);
    class_weight.push_back(per_class);
  }

  // As the operators get them, kHeadsPerLaunch at a time; results, where `place(head, h)` puts them.
  template <typename Place>
  std::vector<Heads<T>> launches(const Place& place) {
    std::vector<Heads<T>> all;
    for (int h = 0; h < count; ++h) {
      const HeadCase& from = c.heads[h];
      if (h % kHeadsPerLaunch == 0) {
        Heads<T>& heads = all.emplace_back();
        heads = {};
        heads.first = h;
      }
      Head<T>& head = all.back().head[all.back().count++];
      head.weight = weight[h].data();
      head.bias = from.bias ? bias[h].data() : nullptr;
      head.target = from.kind == TargetKind::kClasses ? static_cast<const void*>(classes[h].data()) : dense[h].data();
      head.sample_weight = from.sample_weight ? sample_weight[h].data() : nullptr;
      head.of_entries = from.of_entries;
      head.class_weight = from.class_weight ? class_weight[h].data() : nullptr;
      head.ignore_index = kIgnoreIndex;
      head.smoothing = from.smoothing;
      head.factor = from.factor();
      head.lambda.value = 1;
      head.loss_weight.value = from.loss_weight;
      if (c.on_device) {
        if (!std::isnan(from.lambda)) {
          head.factor = -2;
          head.lambda_form = h % 2 == 0 ? NumberForm::kDoubleAt : NumberForm::kFloatAt;
          if (h % 2 == 0) {
            head.lambda.double_at = &half_lambda[h];
          } else {
            head.lambda.float_at = &half_lambda_float[h];
          }
        }
        head.loss_weight.double_at = &loss_weight[h % loss_weight.size()];
        head.loss_weight_form = NumberForm::kDoubleAt;
      }
      head.begin = begin[h];
      head.end = begin[h + 1];
      head.kind = from.kind;
      place(head, h);
    }
    return all;
  }

  // Roundings of a sum of n terms, at the terms' size: n at worst, about its root in fact, and those of its terms.
  static double roundings(double n) { return (8 + std::sqrt(n)) * kRounding<A>; }

  Sums wanted_logits() {
    Sums want(c.rows * columns);
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int k = 0; k < columns; ++k) {
        const int h = head_of[k], own = k - begin[h];
        const auto add = [&](double term) { want.add(r * columns + k, term, roundings(c.features) * std::fabs(term)); };
        add(c.heads[h].bias ? value(bias[h][own]) : 0);
        for (int d = 0; d < c.features; ++d) {
          add(value(x[r * c.features + d]) * value(weight[h][int64_t{own} * c.features + d]));
        }
      }
    }
    return want;
  }

  // Of output k, for the kinds with a loss for each output.
  double row_weight(int64_t r, int h, int k = 0) const {
    const HeadCase& head = c.heads[h];
    const double s = !head.sample_weight ? 1 : sample_weight[h][head.of_entries ? r * head.size + k : r];
    return head.kind == TargetKind::kClasses && classes[h][r] == kIgnoreIndex ? 0 : s;
  }

  double norm_of(int h) const {
    const HeadCase& head = c.heads[h];
    double norm = 0;
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int k = 0; k < (is_by_output(head) ? head.size : 1); ++k) {
        const double s = row_weight(r, h, k);
        const bool by_class = head.kind == TargetKind::kClasses && head.class_weight && s != 0;
        norm += s * (by_class ? class_weight[h][classes[h][r]] : 1);
      }
    }
    return c.mean ? norm : 1;
  }

  // From the logits z (rows, columns), each known up to `z_error`.
  WantedLoss wanted_loss(const std::vector<double>& z, double z_error) const {
    WantedLoss out;
    out.head.assign(count, 0);
    out.head_error.assign(count, 0);
    out.g.assign(z.size(), 0);
    out.g_error.assign(z.size(), 0);
    for (int h = 0; h < count; ++h) {
      const HeadCase& head = c.heads[h];
      const double norm = norm_of(h);
      const bool binary = head.size == 1;
      for (int64_t r = 0; r < c.rows; ++r) {
        const double s = is_by_output(head) ? 1 : row_weight(r, h);
        if (s == 0 || norm == 0) {
          continue;
        }
        const double* const own = &z[r * columns + begin[h]];
        const double factor = s * head.loss_weight / norm;
        double loss = 0, loss_error = 0;
        const auto set = [&](int k, double dz, double error) {
          out.g[r * columns + begin[h] + k] = factor * dz;
          out.g_error[r * columns + begin[h] + k] = std::fabs(factor) * error;
        };
        if (is_by_output(head)) {
          for (int k = 0; k < head.size; ++k) {
            const double weight = row_weight(r, h, k), target = dense[h][r * head.size + k];
            if (weight == 0) {
              continue;
            }
            if (head.kind == TargetKind::kValues) {
              const double error = own[k] - target;
              loss += weight * error * error;
              loss_error += weight * (2 * std::fabs(error) + 1) * z_error;
              set(k, weight * 2 * error, weight * 2 * z_error * (1 + std::fabs(error)));
            } else {
              loss += weight * (std::log1p(std::exp(-own[k])) * target + std::log1p(std::exp(own[k])) * (1 - target));
              loss_error += weight * (1 + std::fabs(own[k])) * z_error;
              set(k, weight * (1 / (1 + std::exp(-own[k])) - target), 2 * weight * z_error);
            }
          }
        } else {
          std::vector<double> logits(head.classes(), 0.0), u(head.classes());
          for (int k = 0; k < head.size; ++k) {
            logits[k + binary] = own[k];
          }
          double top = -INFINITY, sum = 0, mass = 0;
          for (int k = 0; k < head.classes(); ++k) {
            double y = classes[h][r] == k;
            if (head.kind == TargetKind::kProbabilities) {
              y = !binary ? dense[h][r * head.size + k] : k == 1 ? dense[h][r] : 1 - dense[h][r];
            }
            u[k] = head.smoothing / head.classes() + (1 - head.smoothing) * y;
            u[k] *= head.class_weight && u[k] != 0 ? class_weight[h][k] : 1;
            mass += u[k];
            top = std::max(top, logits[k]);
          }
          for (const double logit : logits) {
            sum += std::exp(logit - top);
          }
          for (int k = 0; k < head.classes(); ++k) {
            loss += u[k] == 0 ? 0 : u[k] * (std::log(sum) - (logits[k] - top));
            if (k >= binary) {
              set(k - binary, mass * std::exp(logits[k] - top) / sum - u[k], (1 + mass) * z_error);
            }
          }
          loss_error = (1 + mass + std::fabs(loss)) * z_error;
        }
        out.head[h] += s * loss / norm;
        out.head_error[h] += s * loss_error / norm;
      }
      out.total += head.loss_weight * out.head[h];
      out.total_error += std::fabs(head.loss_weight) * out.head_error[h];
    }
    return out;
  }
};

// Memory for one operator, NaN all over.
struct Allocator {
  std::list<std::vector<double>> pieces;
  void* operator()(int64_t bytes) {
    pieces.emplace_back(bytes / 8 + 64, NAN);
    return reinterpret_cast<void*>(round_up(reinterpret_cast<intptr_t>(pieces.back().data()), 256));
  }
};

}  // namespace heads_oracle
