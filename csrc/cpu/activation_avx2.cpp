// Loops of 8 numbers. AVX2 and FMA; products that must be exact are not fused.

#include "activation_kernels.h"

#if defined(__AVX2__) && defined(__FMA__)

#include "activation_loops.h"
#include "vector_avx2.h"

namespace ptq4adm {

const ActivationKernels* avx2_activation_kernels() { return &Loops<Avx2>::table("avx2"); }

}  // namespace ptq4adm

#else

namespace ptq4adm {

const ActivationKernels* avx2_activation_kernels() { return nullptr; }

}  // namespace ptq4adm

#endif
