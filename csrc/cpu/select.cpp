// Chooses the instruction set, by cpuid or by name.

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace ptq4adm {
namespace {

bool has_avx2() {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_cpu_supports("avx2") != 0;  // also asks whether the system saves the registers
#else
  return false;
#endif
}

}  // namespace

const Kernels& select_kernels(const char* isa) {
  const std::string name(isa);
  const Kernels* avx2 = has_avx2() ? avx2_kernels() : nullptr;
  if (name == "auto") return avx2 != nullptr ? *avx2 : scalar_kernels();
  if (name == "scalar") return scalar_kernels();
  if (name != "avx2") {
    throw std::invalid_argument("isa '" + name + "' is unknown; use auto, avx2 or scalar");
  }
  if (avx2 == nullptr) {
    throw std::runtime_error("isa 'avx2' is not available on this processor or in this build; "
                             "use isa='auto'");
  }
  return *avx2;
}

}  // namespace ptq4adm
