// Loops of 16 numbers with masked ends. AVX-512 F, BW, DQ, VL.

#include "activation_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "activation_loops.h"
#include "vector_avx512.h"

namespace ptq4adm {

const ActivationKernels* avx512_activation_kernels() { return &Loops<Avx512>::table("avx512"); }

}  // namespace ptq4adm

#else

namespace ptq4adm {

const ActivationKernels* avx512_activation_kernels() { return nullptr; }

}  // namespace ptq4adm

#endif
