// The heads' kernels against plain loops in double precision (heads_oracle.h): every form, option and element type,
// many sizes, outputs between guards, twice for the same bits. `heads_test TYPE` runs one element type; `races` few
// cases of each form, for ThreadSanitizer, to which a thread is expensive, and `races_of_TYPE` fewer; `plan` the launch
// shapes alone; `launches` what a device would say to them; `small` how many there are at a small size;
// `rows_share_warps` what a row costs; `device_code` which GPUs a build serves; `bad_target` must end in the kernel's
// assertion. For tests/ptx: `compiled_TYPE`, few cases that reach every kernel, `several_tiles`, one case, and `tiles
// COLUMNS TILES`, one block's sweep over so many tiles of 16 rows of 1024 bf16 features.
#include "heads_oracle.h"

#include <numeric>
#include <string_view>
#include <utility>

#include "device_code.h"

namespace {

using namespace grl_ext;
using namespace heads_oracle;

int failures = 0;

// Of the devices that the cases run on. 0: they have no matrix units.
int capability = 0;

template <typename T>
struct Run : Inputs<T> {
  using A = typename Arithmetic<T>::type;
  using Inputs<T>::c;
  using Inputs<T>::count;
  using Inputs<T>::columns;
  using Inputs<T>::head_of;
  using Inputs<T>::begin;
  using Inputs<T>::x;
  using Inputs<T>::weight;
  using Inputs<T>::grad_logits;
  using Inputs<T>::roundings;

  explicit Run(const Case& of) : Inputs<T>(of) { c.device.capability = capability; }

  void report(bool good, const char* what) {
    if (!good) {
      ++failures;
      std::printf("wrong: %s of %zu bytes an element, %s\n", what, sizeof(T), describe(c).c_str());
    }
  }

  // got (rows, width) of a tensor against columns [first, first + width) of want (rows, all).
  void compare(const char* what, Guarded<T>& got, const Sums& want, int64_t width, int64_t first, int64_t all) {
    bool good = got.guards_hold();
    for (int64_t i = 0; i < got.size(); ++i) {
      const int64_t j = i / width * all + first + i % width;
      const double tolerance = kRounding<T> * std::fabs(want.sum[j]) + want.error[j] + kSmallest<T>;
      if (!near(value(got[i]), want.sum[j], tolerance)) {
        if (good) {
          std::printf(
              "%s[%lld] = %g, not %g +- %g\n", what, static_cast<long long>(i), value(got[i]), want.sum[j], tolerance);
        }
        good = false;
      }
    }
    report(good, what);
  }

  struct Results {
    Guarded<T> dx;
    std::vector<Guarded<T>> logits, dw, db;
    Guarded<A> head_losses, loss;
    explicit Results(const Run& run)
        : dx(run.c.needs_dx ? run.c.rows * run.c.features : 0), head_losses(run.count), loss(1) {
      for (const HeadCase& head : run.c.heads) {
        logits.emplace_back(run.c.rows * head.size);
        dw.emplace_back(head.needs_weight ? int64_t{head.size} * run.c.features : 0);
        db.emplace_back(head.needs_bias ? head.size : 0);
      }
    }
    bool same_bits(Results& other) {
      bool same = dx.same_bits(other.dx) && head_losses.same_bits(other.head_losses) && loss.same_bits(other.loss);
      for (std::size_t h = 0; h < dw.size(); ++h) {
        same &= logits[h].same_bits(other.logits[h]) && dw[h].same_bits(other.dw[h]) && db[h].same_bits(other.db[h]);
      }
      return same;
    }
    void forget() {
      dx.forget();
      head_losses.forget();
      loss.forget();
      for (auto* tensors : {&logits, &dw, &db}) {
        for (Guarded<T>& tensor : *tensors) {
          tensor.forget();
        }
      }
    }
  };

  // Memory for one operator, which a replay of it will find as it was left.
  auto allocator() {
    return [&memory = memory_.emplace_back()](int64_t bytes) { return memory(bytes); };
  }

  // run(stream) must start all its kernels.
  template <typename Start>
  void start(const char* what, const Start& run) {
    Stream stream{c.device, nullptr};
    run(stream);
    report(stream.status == cudaSuccess, what);
  }

  // run(results, stream), twice.
  template <typename Operation>
  void start_twice(const char* what, Results& got, const Operation& run) {
    std::vector<std::function<cudaError_t()>> graph;
    cuda_emulation::recorded = c.again == Again::kReplayed ? &graph : nullptr;
    start(what, [&](Stream& stream) { run(got, stream); });
    cuda_emulation::recorded = nullptr;
    if (c.again == Again::kReplayed) {
      got.forget();
      for (const auto& launch : graph) {
        report(launch() == cudaSuccess, what);
      }
    } else if (c.again == Again::kElsewhere) {
      Results again(*this);
      start(what, [&](Stream& stream) { run(again, stream); });
      report(got.same_bits(again), (std::string("the repetition of ") + what).c_str());
    }
  }

  std::vector<Heads<T>> heads_into(Results& results) {
    return this->launches([&](Head<T>& head, int h) {
      head.logits = results.logits[h].data();
      head.grad_weight = c.heads[h].needs_weight ? results.dw[h].data() : nullptr;
      head.grad_bias = c.heads[h].needs_bias ? results.db[h].data() : nullptr;
    });
  }

  std::vector<Heads<T>> heads_with_gradients(Results& results) {
    auto all = heads_into(results);
    for (Heads<T>& heads : all) {
      for (int h = 0; h < heads.count; ++h) {
        heads.head[h].grad_logits = grad_logits[heads.first + h].data();
        heads.head[h].target = nullptr;
        heads.head[h].kind = TargetKind::kNone;
      }
    }
    return all;
  }

  HeadsCall<T> call(Results& results, const std::vector<Heads<T>>& heads) {
    return {x.data(), c.needs_dx ? results.dx.data() : nullptr, c.rows, c.features, columns, heads[0]};
  }
  HeadsCall<T> call(Results& results) { return call(results, heads_into(results)); }

  void check_logits_of(Results& got, const Sums& want) {
    for (int h = 0; h < count; ++h) {
      if (!c.heads[h].infinite_weight) {
        compare("logits", got.logits[h], want, c.heads[h].size, begin[h], columns);
      }
    }
  }

  // From g(row, column), known up to error(row, column).
  template <typename G, typename E>
  void check_gradients(Results& got, const G& g, const E& error) {
    Sums dx(c.needs_dx ? c.rows * c.features : 0), dw(int64_t{columns} * c.features), db(columns);
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int k = 0; k < columns; ++k) {
        const double dz = g(r, k);
        const int h = head_of[k];
        const auto add = [&](Sums& sums, int64_t i, double terms, double factor) {
          const double of_dz = roundings(terms) + (capability > 0 ? kSplitting<T> : 0);
          sums.add(i, dz * factor, (of_dz * std::fabs(dz) + error(r, k)) * std::fabs(factor));
        };
        const double s = c.heads[h].factor();
        for (int d = 0; d < c.features; ++d) {
          if (c.needs_dx && s != 0) {
            add(dx, r * c.features + d, columns, s * value(weight[h][int64_t{k - begin[h]} * c.features + d]));
          }
          add(dw, int64_t{k} * c.features + d, static_cast<double>(c.rows), value(x[r * c.features + d]));
        }
        add(db, k, static_cast<double>(c.rows), 1);
      }
    }
    compare("dx", got.dx, dx, std::max(1, c.features), 0, std::max(1, c.features));
    for (int h = 0; h < count; ++h) {
      if (!c.heads[h].infinite_weight && !c.nan_rows) {
        compare("dw", got.dw[h], dw, std::max<int64_t>(1, got.dw[h].size()), int64_t{begin[h]} * c.features, 0);
      }
      if (!c.heads[h].infinite_weight) {
        compare("db", got.db[h], db, c.heads[h].size, begin[h], 0);
      }
    }
  }

  void check_logits() {
    Results got(*this);
    start("heads_logits", [&](Stream& stream) { heads_logits(call(got), stream, allocator()); });
    check_logits_of(got, this->wanted_logits());
  }

  void check_heads_gradients() {
    Results got(*this);
    start_twice("heads_gradients", got, [&](Results& out, Stream& stream) {
      heads_gradients(call(out, heads_with_gradients(out)), stream, allocator());
    });
    check_gradients(
        got,
        [&](int64_t r, int k) {
          return value(grad_logits[head_of[k]][r * c.heads[head_of[k]].size + k - begin[head_of[k]]]);
        },
        [](int64_t, int) { return 0.0; });
  }

  void check_losses(Results& got, const WantedLoss& want) {
    bool good = got.head_losses.guards_hold() && got.loss.guards_hold(), infinite = false;
    for (int h = 0; h < count; ++h) {
      infinite |= c.heads[h].infinite_weight;
      good &= c.heads[h].infinite_weight || near(got.head_losses[h], want.head[h], want.head_error[h]);
    }
    good &= infinite || near(got.loss[0], want.total, want.total_error);
    if (!good) {
      std::printf("loss %g, not %g +- %g\n", static_cast<double>(got.loss[0]), want.total, want.total_error);
    }
    report(good, "losses");
  }

  void run_loss(Results& out, Stream& stream) {
    const auto plan = plan_heads(problem_with_loss(call(out), c.mean), c.device);
    heads_loss(call(out), plan, c.mean, {out.loss.data(), out.head_losses.data()}, stream, allocator());
  }

  void check_loss() {
    Results got(*this);
    start_twice("heads_loss", got, [&](Results& out, Stream& stream) { run_loss(out, stream); });

    Sums z = this->wanted_logits();
    check_logits_of(got, z);
    // The loss and softmax - y inherit the errors of the row's logits as they are, not in proportion to themselves.
    double inherited = 16 * kRounding<A>;
    for (const double error : z.error) {
      inherited = std::isfinite(error) ? std::max(inherited, 2 * error + 16 * kRounding<A>) : inherited;
    }
    const WantedLoss want = this->wanted_loss(z.sum, inherited);
    check_losses(got, want);
    const auto matters = [&](int k) { return !c.heads[head_of[k]].infinite_weight; };
    check_gradients(
        got, [&](int64_t r, int k) { return matters(k) ? want.g[r * columns + k] : 0; },
        [&](int64_t r, int k) { return matters(k) ? want.g_error[r * columns + k] : 0; });
  }

  // All kernels that stand between products. The heads' grad_logits serve as logits here.
  void check_between_products() {
    const int pitch = static_cast<int>(round_up(columns, kProductColumns));
    Results got(*this), split(*this);
    const auto heads = heads_into(got);
    Guarded<T> z(c.rows * pitch), g(c.rows * pitch), scaled(c.rows * pitch), g_only(c.rows * pitch),
        rescaled(c.rows * pitch);
    Guarded<T> matrix(int64_t{pitch} * c.features), vector(pitch);
    Sums logits(c.rows * columns), gradients(c.rows * columns);
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int k = 0; k < pitch; ++k) {
        z[r * pitch + k] = element<T>(NAN);
        if (k < columns) {
          const int h = head_of[k];
          const T given = grad_logits[h][r * c.heads[h].size + k - begin[h]];
          z[r * pitch + k] = c.heads[h].masked && k + 1 == begin[h + 1] ? element<T>(-INFINITY) : given;
          logits.sum[r * columns + k] = value(z[r * pitch + k]);
          gradients.sum[r * columns + k] = value(given);
        }
      }
    }
    Products<T> buffers{c.rows,        c.features, columns,  pitch,        matrix.data(),
                        vector.data(), z.data(),   g.data(), scaled.data()};
    start("gather_weights", [&](Stream& stream) { gather_weights(buffers, heads, stream); });
    bool good = matrix.guards_hold() && vector.guards_hold();
    const auto same = [](const T& a, const T& b) { return std::memcmp(&a, &b, sizeof(T)) == 0; };
    for (int k = 0; k < pitch; ++k) {
      const int h = k < columns ? head_of[k] : 0;
      const bool has_bias = k < columns && c.heads[h].bias;
      good &= same(vector[k], has_bias ? this->bias[h][k - begin[h]] : element<T>(0));
      for (int d = 0; d < c.features; ++d) {
        good &= same(
            matrix[int64_t{k} * c.features + d],
            k < columns ? weight[h][int64_t{k - begin[h]} * c.features + d] : element<T>(0));
      }
    }
    report(good, "gathered weights");

    start("zero_weights", [&](Stream& stream) { zero_weights(buffers, heads, stream); });
    good = matrix.guards_hold();
    for (int k = 0; k < columns; ++k) {
      const int h = head_of[k];
      for (int d = 0; d < c.features; ++d) {
        const T own = weight[h][int64_t{k - begin[h]} * c.features + d];
        good &= same(matrix[int64_t{k} * c.features + d], c.heads[h].factor() == 0 ? element<T>(0) : own);
      }
    }
    report(good, "zeroed weights");

    start("split_logits", [&](Stream& stream) { split_logits(buffers, heads_into(split), stream); });
    check_logits_of(split, logits);

    const LossOutputs<A> outputs{got.loss.data(), got.head_losses.data()};
    start("heads_loss_between_products", [&](Stream& stream) {
      heads_loss_between_products(buffers, heads, count, c.mean, outputs, stream, allocator());
    });
    check_logits_of(got, logits);
    const WantedLoss want = this->wanted_loss(logits.sum, 64 * kRounding<A>);
    check_losses(got, want);
    const auto check_buffer = [&](const char* what, Guarded<T>& buffer, const std::vector<double>& sum,
                                  const std::vector<double>& error, bool with_factor) {
      Sums padded(c.rows * pitch);
      for (int64_t r = 0; r < c.rows; ++r) {
        for (int k = 0; k < columns; ++k) {
          const double s = with_factor ? c.heads[head_of[k]].factor() : 1;
          const double v = sum[r * columns + k];
          padded.add(
              r * pitch + k, s == 0 ? 0 : v * s,
              (error[r * columns + k] + 2 * kRounding<A> * std::fabs(v)) * std::fabs(s));
        }
      }
      compare(what, buffer, padded, 1, 0, 1);
    };
    check_buffer("g", g, want.g, want.g_error, false);
    check_buffer("scaled", scaled, want.g, want.g_error, true);

    buffers.g = g_only.data();
    buffers.scaled = rescaled.data();
    start("gather_gradients", [&](Stream& stream) { gather_gradients(buffers, heads_with_gradients(got), stream); });
    check_buffer("gathered gradients", g_only, gradients.sum, gradients.error, false);
    check_buffer("scaled gradients", rescaled, gradients.sum, gradients.error, true);
  }

  bool finite() const {
    return !c.nan_rows &&
        std::none_of(c.heads.begin(), c.heads.end(), [](const HeadCase& head) { return head.infinite_weight; });
  }

  void check_sweeps() {
    if (finite()) {
      check_logits();
    }
    if (!c.nan_rows) {
      check_heads_gradients();
    }
    Results results(*this);
    if (plan_heads(problem_with_loss(call(results), c.mean), c.device).form != HeadsForm::kProducts) {
      check_loss();
    }
  }

  void check() {
    if (finite()) {
      check_between_products();
    }
    if (columns <= kMaxSweepColumns) {
      check_sweeps();
    }
  }

 private:
  std::list<Allocator> memory_;
};

constexpr HeadsDevice kHopper = {3, 227 << 10};  // as many blocks as ThreadSanitizer can tell apart
constexpr HeadsDevice kOneSm = {1, 227 << 10};  // few blocks: each sweeps over many tiles
constexpr HeadsDevice kTight = {2, 29 << 10};  // slices: two passes for floats and doubles
constexpr HeadsDevice kAmpere = {2, 99 << 10};

HeadCase with(int size, TargetKind kind, bool sample_weight, bool class_weight, double smoothing, double lambda = NAN) {
  HeadCase head{size};
  head.kind = kind;
  head.sample_weight = sample_weight;
  head.class_weight = class_weight;
  head.smoothing = smoothing;
  head.lambda = lambda;
  return head;
}

// Heads that between them have every kind and option, and one of each alone.
std::vector<std::vector<HeadCase>> option_heads() {
  constexpr auto kClasses = TargetKind::kClasses, kProbabilities = TargetKind::kProbabilities,
                 kValues = TargetKind::kValues, kIndicators = TargetKind::kIndicators;
  const auto by_entries = [](HeadCase head) {
    head.of_entries = true;
    return head;
  };
  std::vector<std::vector<HeadCase>> lists = {
      heads_of({2, 2}),
      {with(4, kClasses, true, false, 0)},
      {with(4, kClasses, false, true, 0.1), with(1, kClasses, false, true, 0.2, 0.75)},
      {with(3, kProbabilities, false, false, 0), with(1, kProbabilities, true, true, 0.1, 0.5)},
      {with(3, kValues, false, false, 0), with(1, kValues, true, false, 0, -0.5)},
      {with(5, kClasses, true, true, 0.1), with(2, kProbabilities, true, false, 0.3, 0.5),
       with(1, kClasses, false, false, 0, 0.25), with(2, kValues, true, false, 0, 0),
       with(1, kProbabilities, false, true, 0), with(1, kValues, false, false, 0, 1)},
      heads_of({31, 1}),
      {with(5, kIndicators, false, false, 0), with(1, kIndicators, true, false, 0, 0.5),
       by_entries(with(3, kIndicators, true, false, 0, 0.25)), by_entries(with(4, kValues, true, false, 0, 0.75)),
       with(2, kIndicators, true, false, 0)},
  };
  for (auto& heads : lists) {
    for (std::size_t h = 0; h < heads.size(); ++h) {
      heads[h].loss_weight = 0.5 + static_cast<double>(h);
      heads[h].bias = h % 3 != 2;
      heads[h].lambda = h == 1 && std::isnan(heads[h].lambda) ? 0.75 : heads[h].lambda;
    }
  }
  return lists;
}

template <typename T>
void check_type() {
  const auto lists = option_heads();
  // Rows x features, each with another of the head lists and devices.
  int i = 0;
  for (const int64_t rows : {0, 1, 5, 16, 33, 100}) {
    for (const int features : {1, 7, 64, 129, 300}) {
      const HeadsDevice device = i % 3 == 0 ? kHopper : i % 3 == 1 ? kOneSm : kTight;
      Case c{rows, features, lists[i % lists.size()], device};
      c.on_device = i % 4 >= 2;
      c.mean = i % 5 != 4;
      c.heads.back().all_ignored = i % 7 == 3 && c.heads.back().kind == TargetKind::kClasses;
      Run<T>(c).check();
      ++i;
    }
  }
  // Every list of options in one pass and in two, as a mean and as a sum.
  for (const auto& heads : lists) {
    for (const HeadsDevice device : {kOneSm, kTight}) {
      for (const bool mean : {true, false}) {
        Case c{21, 300, heads, device};
        c.mean = mean;
        Run<T>(c).check();
      }
    }
  }
  // Every choice of gradients, in one pass and in two.
  for (unsigned needs = 0; needs < 8; ++needs) {
    Case c{20, 100, heads_of({3, 1, 2}), kOneSm, (needs & 1) != 0};
    for (std::size_t h = 0; h < c.heads.size(); ++h) {
      c.heads[h].needs_weight = (needs & 2) != 0 && h != needs / 4;
      c.heads[h].needs_bias = (needs & 4) != 0 && h != 1;
    }
    Run<T>(c).check();
    c.features = 300;
    c.device = kTight;
    Run<T>(c).check();
  }
  for (const HeadsDevice device : {kOneSm, kTight}) {
    // lambda = 0: no trace of the head in dx, though its weights be infinite; with lambda known to the host and not.
    Case c{19, 130, heads_of({4, 3}), device};
    c.heads[1].lambda = 0;
    for (const bool on_device : {false, true}) {
      c.on_device = on_device;
      c.heads[1].infinite_weight = false;
      Run<T>(c).check();
      c.heads[1].infinite_weight = true;
      Run<T>(c).check();
    }
    // Rows of weight 0 are ignored, though their features and targets be NaN.
    c = {
        19,
        130,
        {with(4, TargetKind::kClasses, false, false, 0), with(3, TargetKind::kClasses, true, true, 0.1),
         with(2, TargetKind::kProbabilities, true, false, 0), with(2, TargetKind::kValues, true, false, 0),
         with(2, TargetKind::kIndicators, true, false, 0)},
        device};
    c.heads.back().of_entries = true;
    c.nan_rows = true;
    Run<T>(c).check();
    // A class that no row has: without smoothing neither its weight nor its logit counts, with it the loss is infinite
    // or NaN, as that of F.cross_entropy.
    for (const double absent_weight : {double{INFINITY}, double{NAN}}) {
      for (const double smoothing : {0.0, 0.1}) {
        c = {19, 130, {}, device};
        for (const auto kind : {TargetKind::kClasses, TargetKind::kProbabilities}) {
          for (const int size : {4, 1}) {
            c.heads.push_back(with(size, kind, false, true, smoothing));
            c.heads.back().absent_weight = absent_weight;
            c.heads.back().masked = smoothing == 0;
          }
        }
        Run<T>(c).check();
      }
    }
    // A mean over nothing.
    c = {19, 130, option_heads()[5], device};
    for (HeadCase& head : c.heads) {
      head.all_ignored = true;
      head.sample_weight = head.sample_weight || head.kind != TargetKind::kClasses;
    }
    Run<T>(c).check();
    c = {19, 132, heads_of({4, 3}), device};
    c.offset = 1;
    Run<T>(c).check();
    c.offset = 2;
    Run<T>(c).check();
  }
  // 512 threads: more of the weights' gradient than 256 threads hold, and more shared memory than half a multiprocessor
  // has.
  Run<T>({20, 500, heads_of({31, 1}), kOneSm}).check();
  Run<T>({20, 1764, lists[2], kAmpere}).check();
  Run<T>({20, 500, lists[5], {1, 64 << 10}}).check();
  Run<T>({9, 1764, heads_of({2, 2}), {2, 58 << 10}}).check();  // a single stage, for halves
  // More rows than the blocks count by themselves, and 32 heads at once.
  Case many{kMaxRowsCountedInPlace / 32 + 5, 1, {}, kTight};
  for (int h = 0; h < 32; ++h) {
    many.heads.push_back(
        with(1, static_cast<TargetKind>(1 + h % 4), h % 2 == 1, h % 8 == 0 || h % 8 == 1, 0, h % 5 ? 0.5 : NAN));
  }
  Run<T>(many).check();
  // The gradients of a mean do not depend on how large all weights are; those of a sum are as small as they.
  for (const auto& [weights, mean] : {std::pair(1e-5, true), {1e7, true}, {1e-5, false}}) {
    Case c{
        37,
        40,
        {with(3, TargetKind::kClasses, true, true, 0.1), with(2, TargetKind::kValues, true, false, 0),
         with(1, TargetKind::kProbabilities, true, false, 0)},
        kHopper};
    c.weights = weights;
    c.mean = mean;
    Run<T>(c).check_loss();
  }
  // Only between matrix products.
  Run<T>({33,
          3,
          {with(40, TargetKind::kClasses, true, true, 0.1, 0), with(1, TargetKind::kClasses, false, false, 0),
           with(2, TargetKind::kProbabilities, false, true, 0), lists[7][0], lists[7][2], lists[7][3]},
          kOneSm})
      .check();
  many = {9, 1, heads_of(std::vector<int>(70, 1)), kOneSm};
  for (std::size_t h = 0; h < 70; ++h) {
    many.heads[h] = with(
        1 + h % 2, static_cast<TargetKind>(1 + h % 4), h % 2 == 1, false, h % 4 >= 2 ? 0 : 0.2, h % 7 ? 0.5 : NAN);
    many.heads[h].loss_weight = 0.5 + static_cast<double>(h);
    many.heads[h].all_ignored = h == 69;
  }
  many.heads[69].kind = TargetKind::kClasses;
  many.on_device = true;
  Run<T>(many).check();
  Run<T>({0, 1, heads_of({33}), kOneSm}).check();
}

// A case whose launches are not repeated: that would be to look at the same accesses twice.
template <typename T>
Run<T> once(Case c) {
  c.again = Again::kNever;
  return Run<T>(c);
}

void races() {
  const auto lists = option_heads();
  once<float>({20, 100, lists[5], kOneSm}).check_sweeps();
  once<float>({20, 100, lists[5], kTight}).check_loss();  // two passes
  once<float>({20, 100, lists[7], kOneSm}).check_loss();
  once<__half>({20, 35, lists[2], kOneSm}).check_sweeps();
  once<float>({9, 516, heads_of({31, 1}), kOneSm}).check_sweeps();  // 512 threads
  once<float>({9, 1764, lists[3], kAmpere}).check_loss();  // a single stage
  once<float>({kMaxRowsCountedInPlace / 32 + 5, 1, heads_of(std::vector<int>(32, 1)), kTight}).check_loss();
  once<float>({20,
               1,
               {with(40, TargetKind::kClasses, true, true, 0.1), with(1, TargetKind::kProbabilities, true, true, 0)},
               kOneSm})
      .check_between_products();
}

// Each form once with the types whose code differs: doubles have half the threads and other shared memory, bf16 is
// widened by pairs.
template <typename T>
void races_of() {
  const auto lists = option_heads();
  once<T>({20, 100, lists[5], kOneSm}).check_sweeps();
  once<T>({20, 100, lists[5], kTight}).check_sweeps();
  if (capability > 0) {
    once<T>({20, 100, lists[6], kOneSm}).check_loss();  // 32 columns
    once<T>({37, 40, heads_of({3}), kHopper}).check_loss();
  }
  once<T>({20,
           1,
           {with(40, TargetKind::kClasses, true, true, 0.1), with(1, TargetKind::kProbabilities, true, true, 0)},
           kOneSm})
      .check_between_products();
}

// What runs the compiled kernels on a CPU (tests/ptx) takes a quarter of a second for a launch. So there are few cases
// here, which between them reach every variant of every kernel, and each option, alignment and number of columns.
template <typename T>
void compiled() {
  const auto lists = option_heads();
  const struct {
    int64_t rows;
    int features;
    HeadsDevice device;
  } sizes[] = {
      {20, 7, kOneSm},   {1, 129, kHopper}, {33, 64, kTight}, {0, 35, kOneSm},
      {19, 300, kTight}, {5, 1, kHopper},   {70, 33, kOneSm},
  };
  for (std::size_t i = 0; i < lists.size(); ++i) {
    const auto& size = sizes[i % std::size(sizes)];
    Case c{size.rows, size.features, lists[i], size.device};
    c.on_device = i % 2 == 0;
    c.mean = i % 3 != 2;
    c.offset = static_cast<int>(i % 3);
    c.again = i % 2 == 0 ? Again::kReplayed : Again::kNever;
    c.heads.back().all_ignored = i == 0;
    Run<T>(c).check();
  }
  for (int columns = 1; columns <= kMaxSweepColumns; ++columns) {
    const int first = columns * 5 / 8;
    Case c{9, 3 + columns * 7 % 45, first > 0 ? heads_of({first, columns - first}) : heads_of({1}), kOneSm};
    c.again = Again::kNever;
    Run<T>(c).check_loss();
  }
  for (const HeadsDevice& device : {kOneSm, kTight}) {
    Case c{
        19,
        131,
        {with(4, TargetKind::kClasses, true, true, 0.1), with(2, TargetKind::kValues, true, false, 0)},
        device};  // rows of weight 0, whose features are NaN
    c.nan_rows = true;
    c.again = Again::kReplayed;
    Run<T>(c).check_loss();
  }
  // 512 threads, and a single stage of shared memory.
  for (Case c :
       {Case{9, 516, heads_of({31, 1}), kOneSm}, Case{9, 1764, lists[3], kAmpere},
        Case{9, 1764, heads_of({2, 2}), {2, 58 << 10}}}) {
    c.again = Again::kNever;
    Run<T>(c).check_sweeps();
  }
  // More rows than the blocks count by themselves, and 32 heads at once.
  Case many{kMaxRowsCountedInPlace / 32 + 5, 1, heads_of(std::vector<int>(32, 1)), kTight};
  many.again = Again::kReplayed;
  Run<T>(many).check_loss();
  // Only between matrix products.
  many = {9, 3, {with(40, TargetKind::kClasses, true, true, 0.1), with(1, TargetKind::kProbabilities, true, true, 0)}};
  Run<T>(many).check_between_products();
  Run<T>({0, 1, heads_of({33}), kOneSm}).check_between_products();
}

// What every launch shape must satisfy, and what the shapes that the design speaks of must come out as.
void plan() {
  const HeadsDevice hopper = {132, 227 << 10}, ampere = {108, 163 << 10}, ada = {128, 99 << 10};
  const HeadsDevice devices[] = {
      hopper,           ampere, ada, {114, 227 << 10},  // H100 PCIe
      {148, 227 << 10},  // B200
      {14, 163 << 10},  // a seventh of an A100
      {82, 99 << 10},  // RTX 3090
      {58, 99 << 10},  // L4
      {170, 99 << 10},  // RTX 5090
      {40, 64 << 10},  // T4
      kTight,
  };
  const auto expect = [](bool good, const char* what, const HeadsProblem& p) {
    if (!good) {
      ++failures;
      std::printf("wrong: %s, N %lld, D %d, K %d\n", what, static_cast<long long>(p.rows), p.features, p.columns);
    }
  };
  const auto problem_of_sizes = [](int64_t rows, int features, int columns, int element, bool weight_gradient) {
    HeadsProblem problem{};
    problem.rows = rows;
    problem.features = features;
    problem.columns = columns;
    problem.target_bytes = 2 * 8;
    problem.rows_to_count = 2 * rows;
    problem.element_bytes = element;
    problem.arithmetic_bytes = std::max(4, element);
    problem.weight_gradient = weight_gradient;
    return problem;
  };
  for (const HeadsDevice& device : devices) {
    for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{9}, int64_t{1000}, int64_t{65536}, int64_t{3} << 30}) {
      for (const int features : {0, 1, 64, 129, 500, 1024, 1764, 2048, 4096, 16384, 100000, kMaxFeatures}) {
        for (const int columns : {1, 2, 4, 5, 8, 9, 12, 16, 17, 31, 32}) {
          for (const int element : {2, 4, 8}) {
            for (const bool weight_gradient : {false, true}) {
              const auto problem = problem_of_sizes(rows, features, columns, element, weight_gradient);
              const Sweep s = plan_sweep(problem, device);
              expect(s.shared_bytes + kStaticBytes <= device.shared_bytes, "shared memory", problem);
              for (const int at : {s.weight_at, s.targets_at, s.sums_at, s.g_at, s.scaled_at}) {
                expect(at % 16 == 0 && at <= s.shared_bytes, "regions of shared memory", problem);
              }
              expect(
                  s.g_at - s.sums_at >= static_cast<int>(sizeof(double)) * s.threads, "a number for each thread",
                  problem);
              expect(s.slice_features % kPiece == 0 && s.tile_rows % kRowGroup == 0, "whole tiles", problem);
              expect(
                  s.blocks * s.rows_per_block >= rows && (s.blocks - 1) * s.rows_per_block < std::max<int64_t>(1, rows),
                  "rows", problem);
              expect(int64_t{s.slices} * s.slice_features >= features, "features", problem);
              expect((s.slices - 1) * int64_t{s.slice_features} < std::max(1, features), "empty slices", problem);
              expect(s.slices <= kMaxGridY, "as many slices as a grid has", problem);
              const int tiles = s.slice_features / kPiece * ((columns + kColumnGroup - 1) / kColumnGroup);
              expect(
                  !weight_gradient || tiles <= kTilesPerThread * s.threads, "tiles of the weight's gradient", problem);
              expect(s.slices == 1 || s.slice_features % 32 == 0, "slices begin at sectors", problem);
            }
          }
        }
      }
    }
  }
  const auto expect_form = [&](HeadsForm form, int64_t rows, int features, int columns, int element) {
    const auto problem = problem_of_sizes(rows, features, columns, element, true);
    expect(plan_heads(problem, hopper).form == form, "form", problem);
  };
  expect_form(HeadsForm::kOnePass, 1000, 1764, 4, 4);
  expect_form(HeadsForm::kOnePass, 4096, 1024, 12, 4);
  expect_form(HeadsForm::kOnePass, 4096, 4096, 4, 2);
  expect_form(HeadsForm::kTwoPasses, 4096, 8192, 12, 4);
  expect_form(HeadsForm::kProducts, 4096, 8192, 12, 2);
  expect_form(HeadsForm::kProducts, 16384, 2048, 33, 4);

  // What computes the products, by sizes, device and what was asked for.
  const auto expect_units = [&](HeadsUnits units, int64_t rows, int features, int columns, int element, int device,
                                HeadsUnits asked = HeadsUnits::kBest) {
    const auto problem = problem_of_sizes(rows, features, columns, element, true);
    expect(choose_units(problem, {132, 227 << 10, device, asked}) == units, "choice of units", problem);
  };
  expect_units(HeadsUnits::kMatrix, 65536, 1024, 4, 2, 90);
  expect_units(HeadsUnits::kMatrix, 65536, 1024, 12, 2, 80);
  expect_units(HeadsUnits::kMatrix, 65536, 1024, 32, 2, 90);
  expect_units(HeadsUnits::kMatrix, 128, 256, 12, 2, 120);
  expect_units(HeadsUnits::kProducts, 65536, 4096, 32, 2, 90);  // two slices
  expect_units(HeadsUnits::kLanes, 65536, 1024, 4, 2, 75);
  expect_units(HeadsUnits::kProducts, 65536, 1024, 12, 2, 75);
  expect_units(HeadsUnits::kLanes, 4096, 1024, 12, 2, 75);  // the features stay in the cache
  expect_units(HeadsUnits::kLanes, 65536, 1024, 12, 4, 90);
  expect_units(HeadsUnits::kLanes, 65536, 1024, 12, 2, 90, HeadsUnits::kLanes);
  expect_units(HeadsUnits::kProducts, 128, 256, 4, 4, 90, HeadsUnits::kProducts);
  expect_units(HeadsUnits::kLanes, 65536, 1024, 4, 2, 75, HeadsUnits::kMatrix);

  // Launches on the matrix units: those of the sweep for every size, and without slices where D is not above 1024.
  for (const HeadsDevice& device : {hopper, ampere, ada}) {
    for (const int64_t rows : {0, 1, 100, 100000, 1 << 24}) {
      for (const int features : {0, 1, 64, 129, 1024, 2048, 16384, kMaxFeatures}) {
        for (const int columns : {1, 8, 9, 12, 17, 32}) {
          for (const bool weight_gradient : {false, true}) {
            const auto problem = problem_of_sizes(rows, features, columns, 2, weight_gradient);
            const Sweep s = plan_matrix_sweep(problem, device);
            expect(s.threads > 0 && s.shared_bytes + kStaticBytes <= device.shared_bytes, "shared memory", problem);
            expect(
                s.blocks * s.rows_per_block >= rows && (s.blocks - 1) * s.rows_per_block < std::max<int64_t>(1, rows),
                "rows", problem);
            expect(
                int64_t{s.slices} * s.slice_features >= features &&
                    (s.slices - 1) * int64_t{s.slice_features} < std::max(1, features),
                "features", problem);
            expect(s.slices <= kMaxGridY, "as many slices as a grid has", problem);
            expect(s.pitch * 2 / 16 % 2 == 1, "rows of a matrix in different banks", problem);
            const int64_t each = divide_up(s.slice_features / kMatrixSide, s.threads / 32);
            expect(
                !weight_gradient || each * s.matrix_groups <= kMatrixBlocks, "blocks of the weight's gradient",
                problem);
            expect(features > 1024 || device.shared_bytes < 227 << 10 || s.slices == 1, "one slice", problem);
          }
        }
      }
    }
  }
}

// Every launch of the operators over a grid of sizes is one that the device takes. Nothing is run. Each operator meets
// a device that no kernel has asked for anything yet.
template <typename T>
void judge(const HeadsDevice& device) {
  using A = typename Arithmetic<T>::type;
  cuda_emulation::only_judge = true;
  cuda_emulation::device.shared_bytes = device.shared_bytes;
  const auto allocate = [](int64_t) -> void* { return nullptr; };
  T some[1];
  for (const int features :
       {1, 8, 64, 96, 127, 128, 192, 256, 384, 512, 768, 1000, 1024, 1764, 2048, 4096, 10000, kMaxFeatures}) {
    for (int columns = 1; columns <= kMaxSweepColumns; ++columns) {
      for (const int count : {1, 3, columns}) {
        if (count > columns) {
          continue;
        }
        for (const int64_t rows : {1, 1 << 24}) {
          for (int needs = 0; needs < 4; ++needs) {
            HeadsCall<T> call{some, some, rows, features, columns, {}};
            call.heads.count = count;
            for (int h = 0; h < count; ++h) {
              Head<T>& head = call.heads.head[h];
              head.begin = h;
              head.end = h + 1 < count ? h + 1 : columns;
              head.grad_weight = needs & 1 ? some : nullptr;
              head.grad_bias = some;
              head.kind = needs & 2 ? TargetKind::kProbabilities : TargetKind::kClasses;
              head.sample_weight = needs & 2 ? reinterpret_cast<A*>(some) : nullptr;
            }
            const auto taken = [&](auto operation) {
              ++cuda_emulation::device.id;
              Stream stream{device, nullptr};
              operation(stream);
              return stream.status == cudaSuccess;
            };
            const auto plan = plan_heads(problem_with_loss(call, true), device);
            const bool good = taken([&](Stream& stream) { heads_logits(call, stream, allocate); }) &&
                taken([&](Stream& stream) { heads_gradients(call, stream, allocate); }) &&
                (plan.form == HeadsForm::kProducts ||
                 taken([&](Stream& stream) { heads_loss(call, plan, true, {}, stream, allocate); }));
            if (!good) {
              ++failures;
              std::printf(
                  "refused: %zu bytes an element, N %lld, D %d, K %d, %d heads, %d bytes of shared memory\n", sizeof(T),
                  static_cast<long long>(rows), features, columns, count, device.shared_bytes);
            }
          }
        }
      }
    }
  }
}

void launches() {
  const HeadsDevice devices[] = {{132, 227 << 10}, {108, 163 << 10}, {128, 99 << 10}};  // H100, A100, L4 and RTX 4090
  for (HeadsDevice device : devices) {
    device.capability = capability;
    judge<__half>(device);
    if (capability == 0) {  // the others are swept by lanes whatever the device has
      judge<float>(device);
      judge<double>(device);
    }
  }
  if (cuda_emulation::launches == 0) {
    ++failures;
  }
  // Two blocks fit on a multiprocessor only where all of its memory may be shared memory.
  for (const auto& [kernel, bytes] : cuda_emulation::dynamic_bytes_asked_for) {
    if (cuda_emulation::carveout_asked_for[kernel] != cudaSharedmemCarveoutMaxShared) {
      ++failures;
      std::printf("wrong: %zu bytes of shared memory without a carve-out\n", bytes);
    }
  }
}

// A step at a small size is two launches, the sweep and the sum of what its blocks left; the backward is one more
// (scale_test.cpp). Numbers on the device change nothing in that: the kernels read them where they are.
template <typename T>
void count_launches() {
  for (const auto& sizes : {std::vector<int>{10, 2}, std::vector<int>{2, 2}}) {
    for (const bool on_device : {false, true}) {
      Case c{128, 256, heads_of(sizes), {132, 227 << 10}};
      c.on_device = on_device;
      Run<T> run(c);
      typename Run<T>::Results got(run);
      cuda_emulation::only_judge = true;
      const std::size_t before = cuda_emulation::launches;
      run.start("heads_loss", [&](Stream& stream) { run.run_loss(got, stream); });
      if (const std::size_t launched = cuda_emulation::launches - before; launched != 2) {
        ++failures;
        std::printf("wrong: %zu launches of %zu bytes an element for %s\n", launched, sizeof(T), describe(c).c_str());
      }
    }
  }
}

void small_steps() {
  count_launches<__half>();
  count_launches<__nv_bfloat16>();
  count_launches<float>();
  count_launches<double>();
}

// A row costs the same instructions whether a warp takes one or eight at a time. So narrow heads take as many rows as
// there are lanes for. Counted by the shuffles in 64 rows of a cross entropy: two sums over the lanes of each head, and
// those of the logits, which do not depend on how rows share warps.
void rows_share_warps() {
  struct {
    std::vector<int> sizes;
    int rows_at_once;
    std::size_t shuffles;  // of a sum over the widest head: a step for each doubling, and one to hand it out
  } cases[] = {{{2, 2}, 8, 2}, {{2, 6}, 4, 4}, {{10, 2}, 2, 5}, {{16}, 2, 5}, {{17}, 1, 6}, {{31, 1}, 1, 6}};
  for (const auto& [sizes, rows_at_once, shuffles] : cases) {
    const auto count = [&, &sizes = sizes](int64_t rows) {
      Run<float> run({rows, 4, heads_of(sizes), kOneSm});
      typename Run<float>::Results got(run);
      const std::size_t before = cuda_emulation::shuffled_lanes.load();
      run.start("heads_loss", [&](Stream& stream) { run.run_loss(got, stream); });
      return cuda_emulation::shuffled_lanes.load() - before;
    };
    const std::size_t columns = std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
    const std::size_t of_logits = (columns + kColumnGroup - 1) / kColumnGroup * (64 / kRowGroup) * 31 *
        (columns <= kColumnGroup ? 2 : 1);  // two warps share a tile where there are fewer tiles than warps
    const std::size_t want = kWarpSize * (64 / rows_at_once * 2 * shuffles + of_logits);
    if (const std::size_t more = count(320) - count(256); more != want) {
      ++failures;
      std::printf("wrong: %zu lanes' shuffles for 64 rows of %zu columns, not %zu\n", more, columns, want);
    }
  }
}

// A build's list of code against GPUs, by compute capability.
void device_code() {
  const char* all = "sm_75,sm_80,sm_86,sm_90,sm_100,sm_120,compute_120";
  struct {
    const char* list;
    int major, minor;
    bool serves;
  } cases[] = {
      {all, 7, 0, false},
      {all, 7, 5, true},
      {all, 8, 0, true},
      {all, 8, 6, true},
      {all, 8, 7, true},
      {all, 8, 9, true},
      {all, 9, 0, true},
      {all, 10, 0, true},
      {all, 10, 3, true},
      {all, 11, 0, false},
      {all, 12, 0, true},
      {all, 12, 1, true},
      {all, 13, 0, true},
      {"sm_86", 8, 0, false},
      {"sm_80", 9, 0, false},
      {"compute_80", 9, 0, true},
      {"compute_80", 7, 5, false},
      {"sm_90a", 9, 0, true},
      {"compute_90a", 10, 0, false},
      {"sm_90a", 9, 1, false},
      {"compute_100f", 10, 3, true},
      {"compute_100f", 12, 0, false},
      {"", 8, 0, false},
  };
  for (const auto& [list, major, minor, serves] : cases) {
    if (any_code_serves(list, major, minor) != serves) {
      ++failures;
      std::printf("wrong: \"%s\" %s %d.%d\n", list, serves ? "does not serve" : "serves", major, minor);
    }
  }
}

// A block sweeps over several tiles: what planted faults in the compiled kernel must spoil.
void several_tiles() {
  Case c{150, 36, heads_of({5, 2}), kOneSm};
  c.again = Again::kNever;
  Run<float>(c).check_loss();
}

void tiles(int columns, int count) {
  Case c{int64_t{kMatrixSide} * count, 1024, heads_of({columns - 2, 2}), kOneSm};
  c.again = Again::kNever;
  Run<__nv_bfloat16>(c).check_loss();
}

void bad_target() {
  Run<float> run({4, 8, heads_of({2, 3})});
  run.classes[1][2] = 3;
  run.check_loss();
}

}  // namespace

int main(int, char** argv) {
  std::string what = argv[1];
  constexpr std::string_view kOnMatrixUnits = "_on_matrix_units";
  if (what.size() > kOnMatrixUnits.size() &&
      what.compare(what.size() - kOnMatrixUnits.size(), kOnMatrixUnits.size(), kOnMatrixUnits) == 0) {
    what.resize(what.size() - kOnMatrixUnits.size());
    capability = kMatrixCapability;
  }
  what == "half"                    ? check_type<__half>()
      : what == "bfloat16"          ? check_type<__nv_bfloat16>()
      : what == "float"             ? check_type<float>()
      : what == "double"            ? check_type<double>()
      : what == "races"             ? races()
      : what == "races_of_double"   ? races_of<double>()
      : what == "races_of_bfloat16" ? races_of<__nv_bfloat16>()
      : what == "races_of_half"     ? races_of<__half>()
      : what == "compiled_half"     ? compiled<__half>()
      : what == "compiled_bfloat16" ? compiled<__nv_bfloat16>()
      : what == "compiled_float"    ? compiled<float>()
      : what == "compiled_double"   ? compiled<double>()
      : what == "several_tiles"     ? several_tiles()
      : what == "tiles"             ? tiles(std::stoi(argv[2]), std::stoi(argv[3]))
      : what == "plan"              ? plan()
      : what == "launches"          ? launches()
      : what == "small"             ? small_steps()
      : what == "rows_share_warps"  ? rows_share_warps()
      : what == "device_code"       ? device_code()
                                    : bad_target();
  return failures != 0;
}
