#include "kernels.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace grl_ext::cpu {

namespace {

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&kKernelsAvx512);
  }
  if (avx2) {
    tables.push_back(&kKernelsAvx2);
  }
#endif
  tables.push_back(&kKernelsBaseline);
  return tables;
}

const Kernels& choose() {
  const auto tables = runnable();
  const char* wanted = std::getenv("GRL_EXT_CPU_ISA");
  if (wanted == nullptr) {
    return *tables.front();
  }
  std::string names;
  for (const auto* table : tables) {
    if (table->isa == std::string(wanted)) {
      return *table;
    }
    names += names.empty() ? table->isa : std::string(", ") + table->isa;
  }
  TORCH_CHECK_VALUE(false, "GRL_EXT_CPU_ISA is '", wanted, "'; this machine runs: ", names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace grl_ext::cpu
