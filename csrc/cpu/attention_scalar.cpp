// Attention for any processor.

#include "attention_loops.h"
#include "vector_scalar.h"

namespace ptq4adm {

const AttentionKernels& scalar_attention_kernels() { return Attention<Scalar, 4>::table("scalar"); }

}  // namespace ptq4adm
