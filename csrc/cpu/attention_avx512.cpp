// Attention in tiles of 6 x 64. AVX-512 F, BW, DQ, VL.

#include "attention_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "attention_loops.h"
#include "vector_avx512.h"

namespace ptq4adm {

const AttentionKernels* avx512_attention_kernels() {
  return &Attention<Avx512, 4>::table("avx512");
}

}  // namespace ptq4adm

#else

namespace ptq4adm {

const AttentionKernels* avx512_attention_kernels() { return nullptr; }

}  // namespace ptq4adm

#endif
