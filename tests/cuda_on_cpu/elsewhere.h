// Launches handed to somebody else, who runs them in the emulation's place: tests/ptx, which has the kernels' PTX.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_types.h"
#include "device_limits.h"

// Runs the kernel of this (mangled) name with its parameters as they lie in the device's constant memory. Returns 0 if
// it went well. Whoever loads a test program as a library sets it before calling main.
extern "C" {
using RunElsewhere = int (*)(
    const char* kernel, unsigned grid_x, unsigned grid_y, unsigned threads, uint64_t dynamic_shared_bytes,
    const char* parameters, uint64_t parameter_bytes);
inline RunElsewhere cuda_emulation_run_elsewhere = nullptr;
}

namespace cuda_emulation {

// Each parameter at the next place that its alignment allows.
template <typename... Params>
std::vector<char> parameter_bytes(const Params&... parameters) {
  std::vector<char> bytes;
  [[maybe_unused]] const auto append = [&bytes](const auto& parameter) {
    const std::size_t alignment = alignof(decltype(parameter));
    const std::size_t at = (bytes.size() + alignment - 1) / alignment * alignment;
    bytes.resize(at + sizeof(parameter));
    std::memcpy(bytes.data() + at, &parameter, sizeof(parameter));
  };
  (append(parameters), ...);
  return bytes;
}

inline cudaError_t run_elsewhere(
    const cudaLaunchConfig_t& config, const void* function, const std::vector<char>& parameters) {
  const std::string name = "_Z" + symbols().name_of(function);
  const int status = cuda_emulation_run_elsewhere(
      name.c_str(), config.gridDim.x, config.gridDim.y, config.blockDim.x, config.dynamicSmemBytes, parameters.data(),
      parameters.size());
  return status == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace cuda_emulation
