#include "activation_kernels.h"
#include "select_vector.h"

namespace ptq4adm {

const ActivationKernels& select_activation_kernels(const char* isa) {
  return select_vector_kernels(isa, scalar_activation_kernels(), avx2_activation_kernels(),
                               avx512_activation_kernels());
}

}  // namespace ptq4adm
