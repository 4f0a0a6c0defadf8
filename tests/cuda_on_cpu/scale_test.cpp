// scale.cuh over element types, forms of the factor, sizes and alignments, in place and not, alone and in lists,
// against a loop in double precision. `scale_test` runs all that are alone, `lists` the lists, and `compiled_TYPE` few
// of both for one element type.
#include "scale.cuh"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace {

using namespace grl_ext;

struct Case {
  int64_t n;
  int grad_offset;  // elements past a 16-byte boundary
  int out_offset;
  bool in_place;
};

int failures = 0;

// Numbers of both signs, and here and there one that has overflowed: an infinity, a NaN.
template <typename T>
T gradient(int64_t i) {
  const double value = i % 11 == 3 ? INFINITY : i % 11 == 6 ? NAN : static_cast<double>(i * 37 % 101 - 50) * 0.173;
  return Arithmetic<T>::narrow(static_cast<typename Arithmetic<T>::type>(value));
}

// Half a unit in the last place for every rounding on the way: of the result, and before it of the factor and of the
// product to f32.
template <typename T>
constexpr double kTolerance = 0x1p-53;
template <>
constexpr double kTolerance<float> = 0x1p-24 + 0x1p-24;
template <>
constexpr double kTolerance<__half> = 0x1p-11 + 0x1p-23;
template <>
constexpr double kTolerance<__nv_bfloat16> = 0x1p-8 + 0x1p-23;

template <typename T>
bool is_scaled(T got_, T grad, double factor) {
  const double got = Arithmetic<T>::widen(got_);
  const double want = factor * Arithmetic<T>::widen(grad);
  if (factor == 0) {
    return got == 0 && !std::signbit(got);
  }
  return got == want || (std::isnan(got) && std::isnan(want)) ||
      std::fabs(got - want) <= kTolerance<T> * std::fabs(want);
}

// n elements between two guards of a known pattern, which must be there afterwards.
template <typename T>
class Guarded {
 public:
  Guarded(int64_t n, int offset) : n_(n), begin_(kGuard + offset), storage_(begin_ + n + kGuard) {
    std::memset(static_cast<void*>(storage_.data()), kPattern, storage_.size() * sizeof(T));
    for (int64_t i = 0; i < n; ++i) {
      data()[i] = gradient<T>(i);
    }
  }
  T* data() { return storage_.data() + begin_; }
  bool is_untouched(int64_t i) { return same(data()[i], gradient<T>(i)); }
  bool guards_hold() {
    T pattern;
    std::memset(static_cast<void*>(&pattern), kPattern, sizeof(T));
    bool hold = true;
    for (int64_t i = 0; i < static_cast<int64_t>(storage_.size()); ++i) {
      hold &= (i >= begin_ && i < begin_ + n_) || same(storage_[i], pattern);
    }
    return hold;
  }

 private:
  static constexpr int64_t kGuard = 16;
  static constexpr int kPattern = 0xa5;
  static bool same(const T& a, const T& b) { return std::memcmp(&a, &b, sizeof(T)) == 0; }
  int64_t n_;
  int64_t begin_;
  std::vector<T> storage_;
};

template <typename T, typename Factor>
void check(const char* form, const Case& c, Factor factor, const std::function<double(int64_t)>& factor_of) {
  Guarded<T> grad(c.n, c.grad_offset);
  Guarded<T> separate(c.n, c.out_offset);
  Guarded<T>& out = c.in_place ? grad : separate;
  // As on a GPU of one multiprocessor: more than eight blocks' work makes the threads stride.
  bool good = scale(out.data(), grad.data(), c.n, factor, /*sm_count=*/1, nullptr) == cudaSuccess;
  good &= grad.guards_hold() && separate.guards_hold();
  for (int64_t i = 0; i < c.n; ++i) {
    good &= is_scaled(out.data()[i], gradient<T>(i), factor_of(i)) && (c.in_place ? separate : grad).is_untouched(i);
  }
  if (!good) {
    ++failures;
    std::printf(
        "wrong: %s, %zu bytes an element, n %lld, grad at %d, out %s at %d\n", form, sizeof(T),
        static_cast<long long>(c.n), c.grad_offset, c.in_place ? "in place" : "elsewhere", c.out_offset);
  }
}

template <typename T>
void check_forms(const Case& c) {
  using A = typename Arithmetic<T>::type;
  for (const double factor : {-0.3, 0.0, 1.0}) {
    const auto single = static_cast<float>(factor);
    check<T>("a value", c, HostFactor<A>{static_cast<A>(factor)}, [=](int64_t) { return factor; });
    check<T>("a double on the device", c, DeviceFactor<A, double>{&factor, A(1)}, [=](int64_t) { return factor; });
    check<T>("a float on the device", c, DeviceFactor<A, float>{&single, A(-2)}, [=](int64_t) {
      return -2 * double{single};
    });
  }
  struct {
    const char* form;
    int64_t period, inner;
  } layouts[] = {
      {"each element its own", c.n, 1}, {"per column", 3, 1}, {"per channel", 5, 7}, {"per row of complex", 9, 2}};
  for (const auto [form, period, inner] : layouts) {
    std::vector<A> values(period);
    for (int64_t p = 0; p < period; ++p) {
      values[p] = static_cast<A>(p % 3 == 1 ? 0.0 : 0.1 * static_cast<double>(p % 999) - 0.7);
    }
    const A multiplier = inner == 1 ? A(-1) : A(-2);
    const auto factor_of = [&, period = period, inner = inner](int64_t i) {
      return double{multiplier * values[i / inner % period]};
    };
    if (inner == 7) {
      check<T>(
          form, c, BroadcastFactor<A, uint64_t>{values.data(), multiplier, uint64_t(period), uint64_t(inner)},
          factor_of);
    }
    check<T>(
        form, c, BroadcastFactor<A, uint32_t>{values.data(), multiplier, uint32_t(period), uint32_t(inner)}, factor_of);
  }
}

// The vectors' widths, by their definition.
template <typename T>
void check_common_width() {
  const T at[16] = {};
  for (int out_offset = 0; out_offset < 16; ++out_offset) {
    for (int grad_offset = 0; grad_offset < 16; ++grad_offset) {
      const int64_t apart = int64_t{out_offset - grad_offset} * int64_t{sizeof(T)};
      const int want = apart % 16 == 0 ? 16 : apart % 8 == 0 ? 8 : apart % 4 == 0 ? 4 : 2;
      if (common_width(at + out_offset, at + grad_offset) != static_cast<uintptr_t>(want)) {
        ++failures;
        std::printf("wrong: the common width of %d and %d, %zu bytes an element\n", out_offset, grad_offset, sizeof(T));
      }
    }
  }
}

// Every pair of alignments, with vectors of every width: none, one and several of them, with and without a rest.
template <typename T>
void check_alignments() {
  using A = typename Arithmetic<T>::type;
  const A values[] = {A(-0.7), A(0), A(0.2)};
  for (const int64_t n : {1, 2, 3, 7, 8, 9, 16, 37}) {
    for (int grad_offset = 0; grad_offset < 16; ++grad_offset) {
      for (int out_offset = 0; out_offset < 16; ++out_offset) {
        check<T>(
            "per column", {n, grad_offset, out_offset, false}, BroadcastFactor<A, uint32_t>{values, A(1), 3, 1},
            [&](int64_t i) { return double{values[i % 3]}; });
      }
    }
  }
}

template <typename T>
void check_type() {
  check_common_width<T>();
  check_alignments<T>();
  for (const int64_t n : {0, 1, 7, 8, 129, 1134, 2500}) {
    for (int offset = 0; offset <= 8; ++offset) {
      check_forms<T>({n, offset, offset, true});
      check_forms<T>({n, offset, offset % 2 ? offset : 0, false});  // reaching a boundary together, and not
    }
  }
  // Past the first vector of each thread: a second for some, and several in flight with a rest.
  const int64_t per_grid = int64_t{kScaleBlocksPerSm} * kScaleThreads * kVectorSize<T>;
  for (const int64_t strided : {per_grid + 1001, (kVectorsInFlight + 1) * per_grid + 1001}) {
    check_forms<T>({strided, 1, 1, true});
    check_forms<T>({strided, 1, 0, false});
    check_forms<T>({strided, 1, 1, false});
  }
}

// Gradients of these sizes, in place by one factor, in as few launches as there can be.
template <typename T, typename Factor>
void check_list(const std::vector<int64_t>& sizes, int sm_count, Factor form, double factor) {
  std::vector<Guarded<T>> gradients;
  std::vector<T*> data;
  for (std::size_t g = 0; g < sizes.size(); ++g) {
    gradients.emplace_back(sizes[g], static_cast<int>(g % 5));
  }
  for (Guarded<T>& gradient : gradients) {
    data.push_back(gradient.data());
  }
  const std::size_t before = cuda_emulation::launches;
  bool good = scale_list(data.data(), sizes.data(), static_cast<int>(sizes.size()), form, sm_count, nullptr) ==
      cudaSuccess;
  const std::size_t launched = cuda_emulation::launches - before;
  const bool any = std::any_of(sizes.begin(), sizes.end(), [](int64_t n) { return n > 0; });
  good &= launched == (any ? (sizes.size() + kGradientsPerLaunch - 1) / kGradientsPerLaunch : 0);
  for (std::size_t g = 0; g < sizes.size(); ++g) {
    good &= gradients[g].guards_hold();
    for (int64_t i = 0; i < sizes[g]; ++i) {
      good &= is_scaled(data[g][i], gradient<T>(i), factor) && (factor != 1 || gradients[g].is_untouched(i));
    }
  }
  if (!good) {
    ++failures;
    std::printf(
        "wrong: a list of %zu, %zu bytes an element, factor %g, %zu launches\n", sizes.size(), sizeof(T), factor,
        launched);
  }
}

template <typename T>
void check_lists() {
  using A = typename Arithmetic<T>::type;
  const std::vector<int64_t> step = {128 * 256, 10 * 256, 2 * 256, 10, 2};  // dx, dW and db of two heads
  std::vector<int64_t> many;
  for (int64_t g = 0; g < 2 * kGradientsPerLaunch + 1; ++g) {
    many.push_back(g % 7 * 31);
  }
  const std::vector<std::vector<int64_t>> lists = {step, many, {}, {0, 0}, {1}};
  for (const auto& sizes : lists) {
    for (const double factor : {-0.3, 0.0, 1.0}) {
      const auto single = static_cast<float>(factor);
      check_list<T>(sizes, 1, HostFactor<A>{static_cast<A>(factor)}, factor);
      check_list<T>(sizes, 4, DeviceFactor<A, double>{&factor, A(1)}, factor);
      check_list<T>(sizes, 2, DeviceFactor<A, float>{&single, A(1)}, double{single});
    }
  }
}

// Few cases that reach every kernel and every alignment, for tests/ptx, where a launch takes long.
template <typename T>
void compiled() {
  for (const Case& c : {
           Case{0, 0, 0, true},
           Case{1, 0, 0, false},
           Case{129, 1, 1, true},
           Case{1134, 3, 0, false},
           Case{1134, 3, 1, false},
           Case{1134, 5, 1, false},
           Case{1134, 0, 0, false},
           Case{
               (kVectorsInFlight + 1) * int64_t{kScaleBlocksPerSm} * kScaleThreads * kVectorSize<T> + 1001, 1, 1, true},
       }) {
    check_forms<T>(c);
  }
  using A = typename Arithmetic<T>::type;
  const double factor = -0.3;
  const auto single = static_cast<float>(factor);
  for (const auto& sizes :
       {std::vector<int64_t>{1000, 130, 0, 3, 1, 7}, std::vector<int64_t>(kGradientsPerLaunch + 1, 5)}) {
    check_list<T>(sizes, 1, HostFactor<A>{static_cast<A>(factor)}, factor);
    check_list<T>(sizes, 4, DeviceFactor<A, double>{&factor, A(1)}, factor);
    check_list<T>(sizes, 2, DeviceFactor<A, float>{&single, A(1)}, double{single});
  }
}

}  // namespace

int main(int count, char** argv) {
  const std::string what = count > 1 ? argv[1] : "";
  const auto check = [&](const char* name, auto zero) {
    using T = decltype(zero);
    what.empty()                                  ? check_type<T>()
        : what == "lists"                         ? check_lists<T>()
        : what == std::string("compiled_") + name ? compiled<T>()
                                                  : void();
  };
  check("half", __half());
  check("bfloat16", __nv_bfloat16());
  check("float", float());
  check("double", double());
  return failures != 0;
}
