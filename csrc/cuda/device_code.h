// Which GPUs the compiled code runs on. Plain C++: no CUDA, no ATen.
#pragma once

#include <algorithm>
#include <string_view>

namespace grl_ext {

// Whether one of nvcc's names for code, "sm_80" or "compute_90", serves a compute capability. Code for a GPU (sm) runs
// on its generation's later ones too; PTX (compute) is compiled for every later GPU when it is loaded. With an `a`
// behind the number both are for that one GPU, with an `f` for its generation.
inline bool code_serves(std::string_view code, int major, int minor) {
  const auto underscore = code.find('_');
  if (underscore == std::string_view::npos) {
    return false;
  }
  const bool is_ptx = code.substr(0, underscore) == "compute";
  int number = 0;
  auto at = underscore + 1;
  for (; at < code.size() && code[at] >= '0' && code[at] <= '9'; ++at) {
    number = 10 * number + (code[at] - '0');
  }
  const char suffix = at < code.size() ? code[at] : ' ';
  const int capability = 10 * major + minor;
  if (suffix == 'a') {
    return capability == number;
  }
  return capability >= number && (major == number / 10 || (is_ptx && suffix != 'f'));
}

// The same for a list of names with commas between them.
inline bool any_code_serves(std::string_view list, int major, int minor) {
  for (std::string_view::size_type begin = 0; begin < list.size();) {
    const auto end = std::min(list.find(',', begin), list.size());
    if (code_serves(list.substr(begin, end - begin), major, minor)) {
      return true;
    }
    begin = end + 1;
  }
  return false;
}

}  // namespace grl_ext
