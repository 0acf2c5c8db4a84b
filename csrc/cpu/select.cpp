// Chooses the matrix products' instruction set, by cpuid or by name.

#include <atomic>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "kernels.h"

namespace ptq4adm {
namespace {

const Kernels* avx2_if_possible() { return has_avx2() ? avx2_kernels() : nullptr; }
const Kernels* avx_vnni_if_possible() { return has_avx_vnni() ? avx_vnni_kernels() : nullptr; }
const Kernels* avx512_vnni_if_possible() {
  return has_avx512_vnni() ? avx512_vnni_kernels() : nullptr;
}
const Kernels* scalar_always() { return &scalar_kernels(); }

struct Choice {
  const char* name;
  const Kernels* (*kernels)();
};

// the fastest first
constexpr Choice kChoices[] = {{"avx512_vnni", avx512_vnni_if_possible},
                               {"avx_vnni", avx_vnni_if_possible},
                               {"avx2", avx2_if_possible},
                               {"scalar", scalar_always}};

#ifdef PTQ4ADM_EMULATE_VNNI
const Kernels* emulated(const std::string& name) {
  if (name == "emulated_avx_vnni") return &emulated_avx_vnni_kernels();
  if (name == "emulated_avx512_vnni") return &emulated_avx512_vnni_kernels();
  return nullptr;
}
#else
const Kernels* emulated(const std::string&) { return nullptr; }
#endif

// Read by every call, so not a std::string: a name out of kChoices, or "auto".
std::atomic<const char*> auto_name{"auto"};

}  // namespace

std::string auto_isa() { return auto_name.load(); }

void set_auto_isa(const std::string& isa) {
  auto_name = isa == "auto" ? "auto" : select_kernels(isa.c_str()).name;
}

bool is_compiled(const std::string& isa) {
  if (isa == "avx512_vnni") return avx512_vnni_kernels() != nullptr;
  if (isa == "avx_vnni") return avx_vnni_kernels() != nullptr;
  if (isa == "avx2") return avx2_kernels() != nullptr;
  return isa == "scalar";
}

const Kernels& select_kernels(const char* isa) {
  const std::string name = std::string(isa) == "auto" ? auto_isa() : isa;
  for (const Choice& choice : kChoices) {
    if (name != "auto" && name != choice.name) continue;
    if (const Kernels* kernels = choice.kernels()) return *kernels;
    if (name == choice.name) {
      throw std::runtime_error("isa '" + name +
                               "' is not available on this processor or in this "
                               "build; use isa='auto'");
    }
  }
  if (const Kernels* kernels = emulated(name)) return *kernels;
  throw std::invalid_argument("isa '" + name +
                              "' is unknown; use auto, avx512_vnni, avx_vnni, "
                              "avx2 or scalar");
}

}  // namespace ptq4adm
