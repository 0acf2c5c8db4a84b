// Attention in tiles of 6 x 16. AVX2 and FMA.

#include "attention_kernels.h"

#if defined(__AVX2__) && defined(__FMA__)

#include "attention_loops.h"
#include "vector_avx2.h"

namespace ptq4adm {

const AttentionKernels* avx2_attention_kernels() { return &Attention<Avx2, 2>::table("avx2"); }

}  // namespace ptq4adm

#else

namespace ptq4adm {

const AttentionKernels* avx2_attention_kernels() { return nullptr; }

}  // namespace ptq4adm

#endif
