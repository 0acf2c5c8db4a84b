// Portable loops: one number at a time, for any processor.

#include "activation_loops.h"
#include "vector_scalar.h"

namespace ptq4adm {

const ActivationKernels& scalar_activation_kernels() { return Loops<Scalar>::table("scalar"); }

}  // namespace ptq4adm
