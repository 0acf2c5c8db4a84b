// Quantization of float32 activations to int8: x_q = clamp(rint(x * (1 / scale)), -127, 127).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace ptq4adm {

// x float32 [rows, columns] contiguous, x_q int8 of the same shape, scale float32 [rows].
// Static: rows = 1 and scale is read. Dynamic: scale = max(absmax, 1e-8) / 127 of each row is
// written; rows = 1 is per tensor. Returns false if x holds NaN or infinity (x_q is then garbage).
bool quantize_int8(const Kernels& kernels, const float* x, int64_t rows, int64_t columns,
                   float* scale, bool is_static, int8_t* x_q, int64_t threads);

}  // namespace ptq4adm
