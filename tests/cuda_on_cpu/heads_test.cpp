// heads.cuh against plain loops in double precision: every form and element type, many sizes, outputs between guards, twice for the
// same bits. `heads_test TYPE` runs one element type; `races` few cases of each form, for ThreadSanitizer, to which a thread is
// expensive; `plan` the launch shapes alone; `bad_target` must end in the kernel's assertion.
#include "heads.cuh"

#include <cstdio>
#include <cstring>
#include <limits>
#include <list>
#include <string>
#include <vector>

namespace {

using namespace grl_ext;

int failures = 0;

struct Case {
  int64_t rows;
  int features;
  std::vector<int> sizes;
  unsigned needs = 7;  // bits: dx, dw, db
  HeadsDevice device = {3, 227 << 10};
  bool bias = true;
  double smoothing = 0;
  bool weighted = false;     // loss weights
  int all_ignored = -1;      // a head without a valid row
  bool on_device = false;    // grad_scale and loss_weight
  int scale_zero = -1;       // a head whose gradient scale is 0
  bool infinite_g = false;   // grad_logits of that head are infinite
  int offset = 0;            // elements that x begins past an aligned address
};

std::string describe(const Case& c) {
  std::string text = "N " + std::to_string(c.rows) + ", D " + std::to_string(c.features) + ", heads";
  for (const int size : c.sizes) {
    text += " " + std::to_string(size);
  }
  return text + ", needs " + std::to_string(c.needs) + ", " + std::to_string(c.device.sm_count) + " multiprocessors, " +
      std::to_string(c.device.shared_bytes) + " bytes of shared memory" + (c.bias ? "" : ", no bias") +
      (c.smoothing > 0 ? ", smoothed" : "") + (c.all_ignored >= 0 ? ", one head ignored" : "") + (c.offset ? ", misaligned" : "");
}

// Repeatable numbers in [-1, 1).
class Numbers {
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
  explicit Guarded(int64_t n, int offset = 0) : n_(n), begin_(kGuard + offset), bytes_((begin_ + n + kGuard) * sizeof(T) + 16) {
    std::memset(bytes_.data(), kPattern, bytes_.size());
    base_ = reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(bytes_.data()), 16));
  }
  T* data() { return reinterpret_cast<T*>(base_) + begin_; }
  T& operator[](int64_t i) { return data()[i]; }
  bool guards_hold() {
    bool hold = true;
    for (const char& byte : bytes_) {
      const char* const end = reinterpret_cast<char*>(data() + n_);
      hold &= (&byte >= reinterpret_cast<char*>(data()) && &byte < end) || byte == static_cast<char>(kPattern);
    }
    return hold;
  }
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

// A smallest step of its own for results that are subnormal halves.
template <typename T>
constexpr double kSmallest = std::is_same_v<T, __half> ? 0x1p-25 : 0;

template <typename T>
struct Run {
  using A = typename Arithmetic<T>::type;
  Case c;
  int columns = 0;
  int count;
  std::vector<int> head_of;
  Guarded<T> x, weight, bias, grad_logits;
  std::vector<int64_t> targets;
  std::vector<double> scale, loss_weight;
  std::vector<float> scale_floats;
  std::vector<Heads> heads;
  int64_t ignore_index = -100;

  static int sum_of(const std::vector<int>& sizes) {
    int sum = 0;
    for (const int size : sizes) {
      sum += size;
    }
    return sum;
  }

  explicit Run(const Case& c)
      : c(c), columns(sum_of(c.sizes)), count(static_cast<int>(c.sizes.size())), x(c.rows * c.features, c.offset),
        weight(int64_t{columns} * c.features), bias(columns), grad_logits(c.rows * columns) {
    Numbers numbers;
    for (int64_t i = 0; i < c.rows * c.features; ++i) {
      x[i] = element<T>(numbers.next());
    }
    for (int64_t i = 0; i < int64_t{columns} * c.features; ++i) {
      weight[i] = element<T>(numbers.next() * 3 / std::sqrt(c.features));
    }
    for (int k = 0; k < columns; ++k) {
      bias[k] = element<T>(numbers.next());
    }
    for (int h = 0; h < count; ++h) {
      head_of.insert(head_of.end(), c.sizes[h], h);
      scale.push_back(h == c.scale_zero ? 0 : h % 2 ? -0.75 : 1);
      loss_weight.push_back(c.weighted ? 0.5 + h : 1);
    }
    scale_floats.assign(scale.begin(), scale.end());
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int h = 0; h < count; ++h) {
        const int classes = std::max(2, c.sizes[h]);
        targets.push_back(h == c.all_ignored || numbers.below(5) == 0 ? ignore_index : numbers.below(classes));
      }
    }
    for (int64_t i = 0; i < c.rows * columns; ++i) {
      grad_logits[i] = element<T>(c.infinite_g && head_of[i % columns] == c.scale_zero ? INFINITY : numbers.next());
    }
    for (int first = 0; first < count; first += kHeadsPerLaunch) {
      Heads group{};
      group.first = first;
      group.count = std::min(kHeadsPerLaunch, count - first);
      group.begin[0] = static_cast<int>(std::find(head_of.begin(), head_of.end(), first) - head_of.begin());
      for (int h = 0; h < group.count; ++h) {
        group.begin[h + 1] = group.begin[h] + c.sizes[first + h];
        group.grad_scale.values[h] = c.on_device ? NAN : scale[first + h];
        group.loss_weight.values[h] = c.on_device ? NAN : loss_weight[first + h];
      }
      if (c.on_device) {
        group.grad_scale.floats = scale_floats.data() + first;
        group.loss_weight.doubles = loss_weight.data() + first;
      }
      heads.push_back(group);
    }
  }

  HeadsInput<T> input() {
    return {x.data(), weight.data(), c.bias ? bias.data() : nullptr, c.rows, c.features, columns};
  }
  Targets all_targets() {
    Targets t{};
    t.classes = targets.data();
    t.stride = count;
    t.rows = c.rows;
    t.ignore_index = ignore_index;
    t.smoothing = c.smoothing;
    return t;
  }

  void report(bool good, const char* what) {
    if (!good) {
      ++failures;
      std::printf("wrong: %s of %zu bytes an element, %s\n", what, sizeof(T), describe(c).c_str());
    }
  }

  void compare(const char* what, Guarded<T>& got, const Sums& want) {
    bool good = got.guards_hold();
    for (std::size_t i = 0; i < want.sum.size(); ++i) {
      const double tolerance = kRounding<T> * std::fabs(want.sum[i]) + want.error[i] + kSmallest<T>;
      if (!(std::fabs(value(got[i]) - want.sum[i]) <= tolerance)) {
        if (good) {
          std::printf("%s[%zu] = %g, not %g +- %g\n", what, i, value(got[i]), want.sum[i], tolerance);
        }
        good = false;
      }
    }
    report(good, what);
  }

  // Roundings of a sum of n terms, at the terms' size: n at worst, about its root in fact, and those of its terms.
  static double roundings(double n) { return (8 + std::sqrt(n)) * kRounding<A>; }

  Sums wanted_logits() {
    Sums want(c.rows * columns);
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int k = 0; k < columns; ++k) {
        const auto add = [&](double term) { want.add(r * columns + k, term, roundings(c.features) * std::fabs(term)); };
        add(c.bias ? value(bias[k]) : 0);
        for (int d = 0; d < c.features; ++d) {
          add(value(x[r * c.features + d]) * value(weight[int64_t{k} * c.features + d]));
        }
      }
    }
    return want;
  }

  struct Gradients {
    Guarded<T> dx, dw, db;
    explicit Gradients(const Run& run)
        : dx(run.c.needs & 1 ? run.c.rows * run.c.features : 0), dw(run.c.needs & 2 ? int64_t{run.columns} * run.c.features : 0),
          db(run.c.needs & 4 ? run.columns : 0) {}
    HeadsGradients<T> out(unsigned needs) {
      return {needs & 1 ? dx.data() : nullptr, needs & 2 ? dw.data() : nullptr, needs & 4 ? db.data() : nullptr};
    }
  };

  // From g(row, column), known up to error(row, column).
  template <typename G, typename E>
  void check_gradients(Gradients& got, const G& g, const E& error) {
    Sums dx(c.needs & 1 ? c.rows * c.features : 0), dw(c.needs & 2 ? int64_t{columns} * c.features : 0), db(c.needs & 4 ? columns : 0);
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int k = 0; k < columns; ++k) {
        const double dz = g(r, k);
        const auto add = [&](Sums& sums, int64_t i, double terms, double factor) {
          sums.add(i, dz * factor, (roundings(terms) * std::fabs(dz) + error(r, k)) * std::fabs(factor));
        };
        const double s = scale[head_of[k]];
        for (int d = 0; d < c.features; ++d) {
          if (c.needs & 1 && s != 0) {
            add(dx, r * c.features + d, columns, s * value(weight[int64_t{k} * c.features + d]));
          }
          if (c.needs & 2) {
            add(dw, int64_t{k} * c.features + d, static_cast<double>(c.rows), value(x[r * c.features + d]));
          }
        }
        if (c.needs & 4) {
          add(db, k, static_cast<double>(c.rows), 1);
        }
      }
    }
    compare("dx", got.dx, dx);
    if (!c.infinite_g) {
      compare("dw", got.dw, dw);
      compare("db", got.db, db);
    }
  }

  // Memory for one operator, NaN all over.
  struct Allocator {
    std::list<std::vector<double>> pieces;
    void* operator()(int64_t bytes) {
      pieces.emplace_back(bytes / 8 + 64, NAN);
      return reinterpret_cast<void*>(round_up(reinterpret_cast<intptr_t>(pieces.back().data()), 256));
    }
  };
  auto allocator() {
    return [memory = std::make_shared<Allocator>()](int64_t bytes) { return (*memory)(bytes); };
  }

  void check_logits() {
    Guarded<T> logits(c.rows * columns);
    report(heads_logits(logits.data(), input(), c.device, nullptr, allocator()) == cudaSuccess, "the start of heads_logits");
    compare("logits", logits, wanted_logits());
  }

  void check_heads_gradients() {
    Gradients got(*this), again(*this);
    for (Gradients* out : {&got, &again}) {
      report(
          heads_gradients(out->out(c.needs), grad_logits.data(), input(), heads[0], c.device, nullptr, allocator()) == cudaSuccess,
          "the start of heads_gradients");
    }
    report(got.dx.same_bits(again.dx) && got.dw.same_bits(again.dw) && got.db.same_bits(again.db), "the repetition of gradients");
    check_gradients(
        got, [&](int64_t r, int k) { return value(grad_logits[r * columns + k]); }, [](int64_t, int) { return 0.0; });
  }

  bool is_valid(int64_t r, int h) const { return targets[r * count + h] != ignore_index; }

  // At least one.
  double valid_of(int h) const {
    int64_t valid = 0;
    for (int64_t r = 0; r < c.rows; ++r) {
      valid += is_valid(r, h);
    }
    return static_cast<double>(std::max<int64_t>(1, valid));
  }

  // The loss and its gradient for the logits z.
  void loss_of(const std::vector<double>& z, std::vector<double>& g, std::vector<double>& head_losses, double& total) {
    g.assign(z.size(), 0);
    head_losses.assign(count, 0);
    total = 0;
    for (int h = 0, begin = 0; h < count; begin += c.sizes[h], ++h) {
      const double weight_of_row = 1 / valid_of(h);
      const bool binary = c.sizes[h] == 1;
      const int classes = std::max(2, c.sizes[h]);
      for (int64_t r = 0; r < c.rows; ++r) {
        const int64_t target = targets[r * count + h];
        if (target == ignore_index) {
          continue;
        }
        std::vector<double> logits(classes, 0.0);
        double sum = 0;
        for (int k = 0; k < c.sizes[h]; ++k) {
          logits[k + binary] = z[r * columns + begin + k];
        }
        for (const double logit : logits) {
          sum += std::exp(logit);
        }
        for (int k = 0; k < classes; ++k) {
          const double y = c.smoothing / classes + (k == target ? 1 - c.smoothing : 0);
          head_losses[h] += y * (std::log(sum) - logits[k]) * weight_of_row;
          if (k >= binary) {
            g[r * columns + begin + k - binary] = (std::exp(logits[k]) / sum - y) * loss_weight[h] * weight_of_row;
          }
        }
      }
      total += loss_weight[h] * head_losses[h];
    }
  }

  void check_losses(Guarded<A>& head_losses, Guarded<A>& loss, const std::vector<double>& want, double total, double error) {
    bool good = head_losses.guards_hold() && loss.guards_hold();
    double weights = 0;
    for (int h = 0; h < count; ++h) {
      good &= std::fabs(head_losses[h] - want[h]) <= error * (1 + want[h]);
      good &= h != c.all_ignored || head_losses[h] == 0;
      weights += loss_weight[h];
    }
    good &= std::fabs(loss[0] - total) <= error * (weights + total);
    if (!good) {
      std::printf("loss %g, not %g\n", static_cast<double>(loss[0]), total);
    }
    report(good, "losses");
  }

  void check_cross_entropy() {
    Guarded<T> logits(c.rows * columns), logits_again(c.rows * columns);
    Guarded<A> head_losses(count), head_losses_again(count), loss(1), loss_again(1);
    Gradients got(*this), again(*this);
    report(
        heads_cross_entropy(
            logits.data(), HeadsLosses<A>{loss.data(), head_losses.data()}, got.out(c.needs), input(), heads[0], all_targets(),
            c.device, nullptr, allocator()) == cudaSuccess,
        "the start of heads_cross_entropy");
    heads_cross_entropy(
        logits_again.data(), HeadsLosses<A>{loss_again.data(), head_losses_again.data()}, again.out(c.needs), input(), heads[0],
        all_targets(), c.device, nullptr, allocator());
    report(
        got.dx.same_bits(again.dx) && got.dw.same_bits(again.dw) && got.db.same_bits(again.db) && logits.same_bits(logits_again) &&
            head_losses.same_bits(head_losses_again) && loss.same_bits(loss_again),
        "the repetition of heads_cross_entropy");

    const Sums z = wanted_logits();
    compare("logits", logits, z);
    std::vector<double> g, losses;
    double total;
    loss_of(z.sum, g, losses, total);
    // The loss and softmax - y inherit the errors of the row's logits as they are, not in proportion to themselves.
    const double inherited = 2 * (z.error.empty() ? 0 : *std::max_element(z.error.begin(), z.error.end())) + 16 * kRounding<A>;
    check_losses(head_losses, loss, losses, total, inherited);
    std::vector<double> row_weight;
    for (int h = 0; h < count; ++h) {
      row_weight.push_back(loss_weight[h] / valid_of(h));
    }
    check_gradients(
        got, [&](int64_t r, int k) { return g[r * columns + k]; },
        [&](int64_t r, int k) { return is_valid(r, head_of[k]) ? inherited * row_weight[head_of[k]] : 0; });
  }

  void check_between_products() {
    Guarded<A> head_losses(count), loss(1);
    Guarded<T> g(c.rows * columns), scaled(c.rows * columns), only_scaled(c.rows * columns);
    // grad_logits serve as logits here.
    report(
        heads_cross_entropy_of_logits(
            HeadsLosses<A>{loss.data(), head_losses.data()}, g.data(), scaled.data(), grad_logits.data(), columns, heads, all_targets(),
            c.device, nullptr, allocator()) == cudaSuccess,
        "the start of heads_cross_entropy_of_logits");
    report(
        heads_scale(only_scaled.data(), g.data(), c.rows, columns, heads, c.device, nullptr) == cudaSuccess, "the start of heads_scale");
    std::vector<double> z(c.rows * columns), want, losses;
    for (std::size_t i = 0; i < z.size(); ++i) {
      z[i] = value(grad_logits[i]);
    }
    double total;
    loss_of(z, want, losses, total);
    check_losses(head_losses, loss, losses, total, 64 * kRounding<A>);
    Sums wanted_g(c.rows * columns), wanted_scaled(c.rows * columns), rescaled(c.rows * columns);
    for (int64_t i = 0; i < c.rows * columns; ++i) {
      const int h = head_of[i % columns];
      // Of softmax and y, before they are subtracted.
      const double error = is_valid(i / columns, h) ? 64 * kRounding<A> * loss_weight[h] / valid_of(h) : 0;
      wanted_g.add(i, want[i], error);
      wanted_scaled.add(i, want[i] * scale[h], error * std::fabs(scale[h]));
      rescaled.add(i, value(g[i]) * scale[h], kRounding<A> * std::fabs(value(g[i])));
    }
    compare("g", g, wanted_g);
    compare("scaled", scaled, wanted_scaled);
    compare("rescaled", only_scaled, rescaled);
  }

  void check() {
    if (columns > kMaxSweepColumns) {
      check_between_products();
      return;
    }
    check_logits();
    check_heads_gradients();
    if (!c.infinite_g) {
      check_cross_entropy();
    }
  }
};

constexpr HeadsDevice kHopper = {3, 227 << 10};    // as many blocks as ThreadSanitizer can tell apart
constexpr HeadsDevice kOneSm = {1, 227 << 10};   // few blocks: each sweeps over many tiles
constexpr HeadsDevice kTight = {2, 24 << 10};    // slices, two passes
constexpr HeadsDevice kAmpere = {2, 99 << 10};

template <typename T>
void check_type() {
  const std::vector<std::vector<int>> few = {{1}, {2, 2}, {10, 2}, {31, 1}};
  // Rows x features, each with another of the head lists and devices.
  int i = 0;
  for (const int64_t rows : {0, 1, 5, 16, 33, 100}) {
    for (const int features : {1, 7, 64, 129, 300}) {
      const HeadsDevice device = i % 3 == 0 ? kHopper : i % 3 == 1 ? kOneSm : kTight;
      Case c{rows, features, few[i % 4], 7, device};
      c.bias = i % 5 != 0;
      c.smoothing = i % 2 ? 0.1 : 0;
      c.weighted = i % 3 == 0;
      c.on_device = i % 4 >= 2;
      c.all_ignored = i % 7 == 3 ? static_cast<int>(c.sizes.size()) - 1 : -1;
      Run<T>(c).check();
      ++i;
    }
  }
  // Every choice of gradients, in one pass and in two.
  for (unsigned needs = 0; needs < 7; ++needs) {
    Run<T>({20, 100, {3, 1, 2}, needs, kOneSm}).check();
    Run<T>({20, 300, {3, 1, 2}, needs, kTight}).check();
  }
  for (const HeadsDevice device : {kOneSm, kTight}) {
    Case c{19, 130, {4, 3}, 7, device};
    c.scale_zero = 1;
    Run<T>(c).check();
    c.infinite_g = true;
    Run<T>(c).check();
    c = {19, 132, {4, 3}, 7, device};
    c.offset = 1;
    Run<T>(c).check();
    c.offset = 2;
    Run<T>(c).check();
  }
  // 512 threads: more of the weight's gradient than 256 threads hold, and more shared memory than half a multiprocessor has.
  Run<T>({20, 500, {31, 1}, 7, kOneSm}).check();
  Run<T>({20, 1764, {2, 2}, 7, kAmpere}).check();
  Run<T>({9, 1764, {2, 2}, 7, {2, 54 << 10}}).check();  // a single stage, for halves
  // More targets than the blocks count by themselves.
  Run<T>({kMaxTargetsCountedInPlace / 32 + 5, 1, std::vector<int>(32, 1), 7, kTight}).check();
  // Between matrix products.
  Run<T>({33, 1, {40, 1, 2}, 7, kOneSm}).check();
  Case many{9, 1, std::vector<int>(70, 1), 7, kOneSm};
  many.all_ignored = 69;
  many.smoothing = 0.2;
  many.weighted = true;
  Run<T>(many).check();
  Run<T>({0, 1, {33}, 7, kOneSm}).check();
}

void races() {
  for (const HeadsDevice device : {kOneSm, kTight}) {
    Run<float>({20, 100, {3, 1}, 7, device}).check();
    Run<__half>({20, 35, {10}, 7, device}).check();
  }
  Run<float>({9, 516, {31, 1}, 7, kOneSm}).check();  // 512 threads
  Run<float>({9, 1764, {2, 2}, 7, kAmpere}).check();  // a single stage
  Run<float>({kMaxTargetsCountedInPlace / 32 + 5, 1, std::vector<int>(32, 1), 0, kTight}).check_cross_entropy();
  Run<float>({20, 1, {40, 1, 2}, 7, kOneSm}).check();
}

// What every launch shape must satisfy, and what the shapes that the design speaks of must come out as.
void plan() {
  const HeadsDevice hopper = {132, 227 << 10}, ampere = {108, 163 << 10}, ada = {128, 99 << 10};
  const auto expect = [](bool good, const char* what, const HeadsProblem& p) {
    if (!good) {
      ++failures;
      std::printf("wrong: %s, N %lld, D %d, K %d\n", what, static_cast<long long>(p.rows), p.features, p.columns);
    }
  };
  for (const HeadsDevice& device : {hopper, ampere, ada, kTight}) {
    for (const int64_t rows : {0, 1, 100, 1000, 100000, 1 << 24}) {
      for (const int features : {0, 1, 64, 129, 1024, 1764, 2048, 16384, 100000}) {
        for (const int columns : {1, 4, 12, 32}) {
          for (const auto& [element, arithmetic] : {std::pair(2, 4), {4, 4}, {8, 8}}) {
            for (const bool weight_gradient : {false, true}) {
              const HeadsProblem problem{rows, features, columns, 2, element, arithmetic, weight_gradient, false};
              const Sweep s = plan_sweep(problem, device);
              expect(s.shared_bytes <= device.shared_bytes, "shared memory", problem);
              expect(s.blocks * s.rows_per_block >= rows && (s.blocks - 1) * s.rows_per_block < std::max<int64_t>(1, rows), "rows", problem);
              expect(int64_t{s.slices} * s.slice_features >= features, "features", problem);
              expect((s.slices - 1) * s.slice_features < std::max(1, features), "empty slices", problem);
              const int tiles = s.slice_features / kPiece * ((columns + kColumnGroup - 1) / kColumnGroup);
              expect(!weight_gradient || tiles <= kTilesPerThread * s.threads, "tiles of the weight's gradient", problem);
              expect(s.slices == 1 || s.slice_features % 32 == 0, "slices begin at sectors", problem);
            }
          }
        }
      }
    }
  }
  const auto expect_form = [&](HeadsForm form, int64_t rows, int features, int columns, int element) {
    const HeadsProblem problem{rows, features, columns, 2, element, std::max(4, element), true, false};
    expect(plan_heads(problem, hopper).form == form, "form", problem);
  };
  expect_form(HeadsForm::kOnePass, 1000, 1764, 4, 4);
  expect_form(HeadsForm::kOnePass, 4096, 1024, 12, 4);
  expect_form(HeadsForm::kOnePass, 4096, 4096, 4, 2);
  expect_form(HeadsForm::kTwoPasses, 4096, 8192, 12, 2);
  expect_form(HeadsForm::kProducts, 16384, 2048, 33, 4);
}

void bad_target() {
  Run<float> run({4, 8, {2, 3}});
  run.targets[3] = 3;
  run.check_cross_entropy();
}

}  // namespace

int main(int, char** argv) {
  const std::string what = argv[1];
  what == "half"       ? check_type<__half>()
      : what == "bfloat16" ? check_type<__nv_bfloat16>()
      : what == "float"    ? check_type<float>()
      : what == "double"   ? check_type<double>()
      : what == "races"    ? races()
      : what == "plan"     ? plan()
                           : bad_target();
  return failures != 0;
}
