// The CPU kernels' tables (csrc/cpu/kernels.h) against plain loops in double, without PyTorch: each table that was
// linked and that the processor runs. Compiled by test_cpu_kernels.py for this processor and for others.
//
//   table_test names         which tables it has, one a line
//   table_test logits|gradients|halves|scale
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace grl_ext::cpu;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (!holds && ++failures <= 20) {
    std::printf("wrong: %s\n", what.c_str());
  }
}

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> tables{&kKernelsBaseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&kKernelsAvx2);
  }
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&kKernelsAvx512);
  }
#endif
  return tables;
}

// Numbers between -1 and 1, the same in every run and on every machine.
class Numbers {
 public:
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<int64_t>(state_) >> 11) * 0x1p-52;
  }

  template <class T>
  std::vector<T> list(size_t n) {
    std::vector<T> list(n);
    for (auto& x : list) {
      x = static_cast<T>(next());
    }
    return list;
  }

 private:
  uint64_t state_ = 1;
};

template <class T>
const HeadsKernels<T>& heads(const Kernels& table) {
  if constexpr (std::is_same_v<T, double>) {
    return table.heads_double;
  } else {
    return table.heads_float;
  }
}

// Rounding of a sum of n products of numbers below 1, whatever their order.
template <class T>
bool close(double found, double expected, long n) {
  return std::fabs(found - expected) <= 2 * static_cast<double>(n + 2) * std::numeric_limits<T>::epsilon();
}

// Every width around those of vectors, tiles and panels; a power of two; one that is not a whole number of vectors.
const std::vector<long> kFeatures{1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 33, 48, 63, 100, 129, 256, 333, 1024, 1764, 1765};
const std::vector<long> kRows{1, 3, 4, 5, 8, 17, 32, 63, kMaxBlockRows};
const std::vector<long> kColumns{0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 33, 40};

template <class F>
void for_each_shape(const F& f) {
  long turn = 0;
  for (const long features : kFeatures) {
    for (const long columns : kColumns) {
      for (size_t i = 0; i < 2; ++i) {  // the rows take turns: all of them with each width would take minutes
        f(kRows[turn++ % static_cast<long>(kRows.size())], features, columns);
      }
    }
  }
}

std::string shape_name(const Kernels& table, long rows, long features, long columns) {
  return std::string(table.isa) + ", " + std::to_string(rows) + " rows, " + std::to_string(features) + " features, " +
      std::to_string(columns) + " columns";
}

template <class T>
void test_logits(const Kernels& table) {
  for_each_shape([&](long rows, long features, long columns) {
    Numbers numbers;
    const auto x = numbers.list<T>(rows * features), w = numbers.list<T>(columns * features);
    const auto bias = numbers.list<T>(columns);
    for (const bool with_bias : {true, false}) {
      std::vector<T> z(columns * kMaxBlockRows);
      heads<T>(table).logits(
          z.data(), x.data(), x.data(), w.data(), with_bias ? bias.data() : nullptr, rows, features, columns);
      for (long c = 0; c < columns; ++c) {
        for (long r = 0; r < rows; ++r) {
          double expected = with_bias ? bias[c] : 0;
          for (long d = 0; d < features; ++d) {
            expected += static_cast<double>(x[r * features + d]) * w[c * features + d];
          }
          expect(
              close<T>(z[c * kMaxBlockRows + r], expected, features),
              "logits, " + shape_name(table, rows, features, columns));
        }
      }
    }
  });
}

template <class T>
void test_gradients(const Kernels& table) {
  const T infinity = std::numeric_limits<T>::infinity();
  long turn = 0;
  for_each_shape([&](long rows, long features, long columns) {
    Numbers numbers;
    const auto x = numbers.list<T>(rows * features), start = numbers.list<T>(columns * features);
    const auto g = numbers.list<T>(columns * kMaxBlockRows), scaled = numbers.list<T>(columns * kMaxBlockRows);
    auto w = numbers.list<T>(columns * features);
    // Of each three columns one does not go into dx, and another one has no dw.
    std::vector<Columns> dx_columns, dw_columns;
    for (long c = 0; c < columns; ++c) {
      if (c % 3 != 1) {
        dx_columns.push_back({c, c + 1});
      } else {
        std::fill_n(w.begin() + c * features, features, infinity);
      }
      if (c % 3 != 2) {
        dw_columns.push_back({c, c + 1});
      }
    }
    const bool streams = turn % 2 == 1;
    const T guard = 77;
    std::vector<T> dx(rows * features + 256, guard), dw = start;
    long before = 0;  // dx begins with a cache line, or three elements later
    while (reinterpret_cast<uintptr_t>(dx.data() + before) % 64 != 0) {
      ++before;
    }
    before += turn / 2 % 2 * 3;
    ++turn;
    heads<T>(table).gradients(
        {.dx = dx.data() + before,
         .dw = dw.data(),
         .grad_logits = g.data(),
         .scaled = scaled.data(),
         .x = x.data(),
         .weight = w.data(),
         .rows = rows,
         .features = features,
         .columns = columns,
         .dx_columns = dx_columns.data(),
         .dx_runs = static_cast<long>(dx_columns.size()),
         .dw_columns = dw_columns.data(),
         .dw_runs = static_cast<long>(dw_columns.size()),
         .dx_streams = streams});
    const auto name = shape_name(table, rows, features, columns) + (streams ? ", streamed" : "");
    for (long i = 0; i < static_cast<long>(dx.size()); ++i) {
      const long r = (i - before) / features, d = (i - before) % features;
      if (i < before || r >= rows) {
        expect(dx[i] == guard, "dx: written outside, " + name);
        continue;
      }
      double expected = 0;
      for (const auto [c, end] : dx_columns) {
        expected += static_cast<double>(scaled[c * kMaxBlockRows + r]) * w[c * features + d];
      }
      expect(close<T>(dx[i], expected, columns), "dx, " + name);
    }
    for (long c = 0; c < columns; ++c) {
      for (long d = 0; d < features; ++d) {
        double expected = start[c * features + d];
        for (long r = 0; r < rows && c % 3 != 2; ++r) {
          expected += static_cast<double>(g[c * kMaxBlockRows + r]) * x[r * features + d];
        }
        expect(close<T>(dw[c * features + d], expected, rows), "dw, " + name);
      }
    }
  });
}

// The value of a half type's bits.
double half_value(unsigned bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
  const double magnitude = exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
      : exponent == 0                     ? std::ldexp(fraction, -24)
                                          : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 != 0 ? -magnitude : magnitude;
}

double bfloat16_value(unsigned bits) {
  const uint32_t wide = bits << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// All 65536 patterns to float and back.
void test_halves(const Kernels& table, const ConvertKernels& kernels, double (*value)(unsigned), const char* what) {
  std::vector<uint16_t> bits(1 << 16), back(1 << 16);
  for (size_t i = 0; i < bits.size(); ++i) {
    bits[i] = static_cast<uint16_t>(i);
  }
  std::vector<float> wide(bits.size());
  kernels.widen(wide.data(), bits.data(), static_cast<long>(bits.size()));
  kernels.narrow(back.data(), wide.data(), static_cast<long>(bits.size()));
  for (unsigned i = 0; i < bits.size(); ++i) {
    const double expected = value(i);
    const bool both_nan = std::isnan(expected) && std::isnan(wide[i]) && std::isnan(value(back[i]));
    const bool same = wide[i] == expected && std::signbit(wide[i]) == std::signbit(expected) && back[i] == i;
    expect(both_nan || same, std::string(table.isa) + ", " + what + " " + std::to_string(i));
  }
}

void test_scale(const Kernels& table) {
  Numbers numbers;
  for (const long n : {1, 7, 16, 100, 1000}) {
    const auto grad = numbers.list<float>(n), each = numbers.list<float>(n);
    std::vector<float> out(n), out_each(n);
    table.scale_float.scale(out.data(), grad.data(), n, -0.5);
    table.scale_float.scale_each(out_each.data(), grad.data(), n, -0.5, each.data());
    for (long i = 0; i < n; ++i) {
      expect(out[i] == -0.5f * grad[i], std::string(table.isa) + ", scale");
      expect(out_each[i] == -0.5f * each[i] * grad[i], std::string(table.isa) + ", scale_each");
    }
    const std::vector<float> infinite(n, INFINITY);
    table.scale_float.scale(out.data(), infinite.data(), n, 0.0);
    for (const float x : out) {
      expect(x == 0, std::string(table.isa) + ", scale by 0");
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count == 2 ? arguments[1] : "";
  for (const auto* table : tables()) {
    if (what == "names") {
      std::printf("%s\n", table->isa);
    } else if (what == "logits") {
      test_logits<float>(*table);
      test_logits<double>(*table);
    } else if (what == "gradients") {
      test_gradients<float>(*table);
      test_gradients<double>(*table);
    } else if (what == "halves") {
      test_halves(*table, table->half, half_value, "half");
      test_halves(*table, table->bfloat16, bfloat16_value, "bfloat16");
    } else if (what == "scale") {
      test_scale(*table);
    } else {
      std::printf("names, logits, gradients, halves or scale?\n");
      return 2;
    }
  }
  return failures == 0 ? 0 : 1;
}
