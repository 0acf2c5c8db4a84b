// Chooses the loops over activations, by cpuid or by name.

#include <stdexcept>
#include <string>

#include "activation_kernels.h"

namespace ptq4adm {
namespace {

// __builtin_cpu_supports also asks whether the system saves the registers.
#if defined(__x86_64__) || defined(__i386__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

const ActivationKernels& required(const ActivationKernels* kernels, const std::string& name) {
  if (kernels == nullptr) {
    throw std::runtime_error("isa '" + name + "' is not available on this processor or in this "
                             "build; use isa='auto'");
  }
  return *kernels;
}

}  // namespace

const ActivationKernels& select_activation_kernels(const char* isa) {
  const std::string name(isa);
  const ActivationKernels* avx2 = has_avx2() ? avx2_activation_kernels() : nullptr;
  const ActivationKernels* avx512 = has_avx512() ? avx512_activation_kernels() : nullptr;
  if (name == "auto") {
    if (avx512 != nullptr) return *avx512;
    return avx2 != nullptr ? *avx2 : scalar_activation_kernels();
  }
  if (name == "scalar") return scalar_activation_kernels();
  if (name == "avx2" || name == "avx_vnni") return required(avx2, name);
  if (name == "avx512_vnni") return required(avx512, name);
  throw std::invalid_argument("isa '" + name + "' is unknown; use auto, avx512_vnni, avx_vnni, "
                              "avx2 or scalar");
}

}  // namespace ptq4adm
