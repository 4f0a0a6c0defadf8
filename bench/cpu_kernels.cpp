// What the parts of the heads' CPU kernels take on one thread, without PyTorch: the medians, in microseconds, of the
// logits and of both gradients in a sweep over blocks of rows. For choosing the constants of csrc/cpu/kernels/tuning.h.
//
//   g++ -std=c++20 -O3 -fwrapv bench/cpu_kernels.cpp csrc/cpu/isa/*.cpp -o build/cpu_kernels
//   build/cpu_kernels avx2 2048 1024 12 [streams]       table, rows, features, columns of all heads
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cpu/kernels.h"

using namespace grl_ext::cpu;

namespace {

const Kernels* table(const std::string& name) {
#if defined(__x86_64__)
  for (const auto* table : {&kKernelsAvx2, &kKernelsAvx512}) {
    if (table->isa == name) {
      return table;
    }
  }
#endif
  return kKernelsBaseline.isa == name ? &kKernelsBaseline : nullptr;
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> list) {
  std::sort(list.begin(), list.end());
  return list[list.size() / 2];
}

// Numbers from a cache line's beginning on, as PyTorch has them.
float* numbers(long n) {
  auto* list = static_cast<float*>(std::aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64));
  for (long i = 0; i < n; ++i) {
    list[i] = static_cast<float>(i % 101) / 101 - 0.5f;
  }
  return list;
}

}  // namespace

int main(int count, char** arguments) {
  const Kernels* kernels = count >= 5 ? table(arguments[1]) : nullptr;
  if (kernels == nullptr) {
    std::printf("cpu_kernels baseline|avx2|avx512 rows features columns [streams]\n");
    return 2;
  }
  const long rows = std::atol(arguments[2]), features = std::atol(arguments[3]), columns = std::atol(arguments[4]);
  const bool streams = count > 5 && std::strcmp(arguments[5], "streams") == 0;
  const long step = std::clamp(kernels->block_elements / features / 4 * 4, 8L, kMaxBlockRows);  // as in heads_sweep.h
  const float *x = numbers(rows * features), *w = numbers(columns * features);
  float *dx = numbers(rows * features), *copy = numbers(rows * features), *dw = numbers(columns * features);
  std::vector<float> z(columns * kMaxBlockRows);
  const Columns all{0, columns};
  const char* names[] = {"logits", "dw", "dx", "all three", "one copy"};
  std::vector<double> times[5];
  const double end = seconds() + 2;
  do {
    double parts[5] = {};
    for (long r = 0; r < rows; r += step) {
      const long height = std::min(step, rows - r), next = std::min(r + height, rows - 1);
      GradientsBlock<float> block{
          .dx = nullptr,
          .dw = dw,
          .grad_logits = z.data(),
          .scaled = z.data(),
          .x = x + r * features,
          .weight = w,
          .rows = height,
          .features = features,
          .columns = columns,
          .dx_columns = &all,
          .dx_runs = 1,
          .dw_columns = &all,
          .dw_runs = 1,
          .dx_streams = streams};
      double before = seconds();
      const auto lap = [&](int part) {
        const double now = seconds();
        parts[part] += now - before;
        parts[3] += now - before;
        before = now;
      };
      kernels->heads_float.logits(
          z.data(), block.x, x + next * features, w, /*bias=*/nullptr, height, features, columns);
      lap(0);
      kernels->heads_float.gradients(block);
      lap(1);
      block.dw = nullptr;
      block.dx = dx + r * features;
      kernels->heads_float.gradients(block);
      lap(2);
    }
    const double before = seconds();
    std::copy_n(x, rows * features, copy);
    parts[4] = seconds() - before;
    for (int i = 0; i < 5; ++i) {
      times[i].push_back(parts[i]);
    }
  } while (seconds() < end);
  for (int i = 0; i < 5; ++i) {
    const double operations = i == 4 ? 0.0 : (i == 3 ? 6.0 : 2.0) * rows * features * columns;
    std::printf(
        "%-10s %9.0f us %7.1f GFLOP/s\n", names[i], 1e6 * median(times[i]), operations / median(times[i]) / 1e9);
  }
}
