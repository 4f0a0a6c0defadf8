// What a device refuses to start, for cuda_emulation.h: the limits of a launch, and how much static shared memory a
// kernel has.
#pragma once

#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace cuda_emulation {

constexpr std::size_t kMaxThreads = 1024;
constexpr std::size_t kSharedBytes = 48 << 10;    // of a block, static and dynamic, that no kernel has to ask for
constexpr std::size_t kMaxParameterBytes = 4096;  // what every driver takes; newer ones take more
constexpr uint64_t kMaxGridX = (uint64_t{1} << 31) - 1;
constexpr uint64_t kMaxGridYZ = 65535;
constexpr unsigned kMaxBlockZ = 64;

// The device that launches go to. A test that wants another one gives it another id as well.
struct Device {
  int id = 0;
  std::size_t shared_bytes = 227
      << 10;  // of a block, static and dynamic, for a kernel that has asked; compute capability 9.0
};
inline Device device;

// With this a launch is judged and counted but not run: for the launches of sizes too large to run here.
inline bool only_judge = false;
inline std::size_t launches = 0;

// ---- Static shared memory
// -----------------------------------------------------------------------------------------------------

// A kernel's __shared__ arrays are thread_local here, so that the compiler writes them down as the kernel's own symbols
// of thread- local storage: function f() {static thread_local int a[8];} has the symbols _Z1fv and _ZZ1fvE1a. Their
// sizes are read from the file that the program or library lies in. Only arrays declared in the kernel itself are
// found, which is where a kernel should declare them.
class Symbols {
 public:
  Symbols() {
    Dl_info program{};
    dladdr(reinterpret_cast<const void*>(&kMaxGridX), &program);
    std::ifstream file(program.dli_fname, std::ios::binary);
    const std::vector<char> image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const auto& header = *reinterpret_cast<const ElfW(Ehdr)*>(image.data());
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(image.data() + header.e_shoff);
    const char* const base = header.e_type == ET_DYN ? static_cast<const char*>(program.dli_fbase) : nullptr;
    for (int s = 0; s < header.e_shnum; ++s) {
      if (sections[s].sh_type != SHT_SYMTAB) {
        continue;
      }
      const char* const names = image.data() + sections[sections[s].sh_link].sh_offset;
      const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(image.data() + sections[s].sh_offset);
      for (std::size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
        const auto& symbol = symbols[i];
        const std::string name = names + symbol.st_name;
        if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && name.rfind("_Z", 0) == 0) {
          functions_[base + symbol.st_value] = name.substr(2);
        } else if (ELF64_ST_TYPE(symbol.st_info) == STT_TLS && name.rfind("_ZZ", 0) == 0) {
          shared_arrays_.emplace_back(name.substr(3), symbol.st_size);
        }
      }
    }
  }

  // Without its _Z.
  const std::string& name_of(const void* function) const {
    const auto found = functions_.find(function);
    if (found == functions_.end()) {
      std::fputs("cuda_emulation: the kernel is not among the program's symbols; was it stripped?\n", stderr);
      std::abort();
    }
    return found->second;
  }

  std::size_t shared_of(const void* function) const {
    const std::string prefix = name_of(function) + "E";
    std::size_t bytes = 0;
    for (const auto& [name, size] : shared_arrays_) {
      if (name.compare(0, prefix.size(), prefix) == 0) {
        bytes += (size + 15) / 16 * 16;  // aligned as a compiler may do it
      }
    }
    return bytes;
  }

 private:
  std::map<const void*, std::string> functions_;                   // names without their _Z
  std::vector<std::pair<std::string, std::size_t>> shared_arrays_;  // names without their _ZZ, and bytes
};

inline const Symbols& symbols() {
  static const Symbols of_this_file;
  return of_this_file;
}

inline std::size_t static_shared_bytes(const void* function) {
  thread_local std::map<const void*, std::size_t> known;
  const auto [entry, is_new] = known.try_emplace(function);
  if (is_new) {
    entry->second = symbols().shared_of(function);
  }
  return entry->second;
}

// ---- Dynamic shared memory
// ----------------------------------------------------------------------------------------------------

// What kernels asked for, by device and kernel.
inline std::map<std::pair<int, const void*>, std::size_t> dynamic_bytes_asked_for;

// The part of the multiprocessor's memory that is to be shared memory, in per cent.
inline std::map<std::pair<int, const void*>, int> carveout_asked_for;

inline bool may_ask_for(const void* function, int64_t dynamic_bytes) {
  return dynamic_bytes >= 0 &&
      static_cast<std::size_t>(dynamic_bytes) + static_shared_bytes(function) <= device.shared_bytes;
}

inline bool may_have(const void* function, std::size_t dynamic_bytes) {
  const auto asked = dynamic_bytes_asked_for.find({device.id, function});
  return dynamic_bytes + static_shared_bytes(function) <= kSharedBytes ||
      (asked != dynamic_bytes_asked_for.end() && dynamic_bytes <= asked->second);
}

}  // namespace cuda_emulation
