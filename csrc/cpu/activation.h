// Norms, gates and the quantization of float32 activations to int8, over whole tensors.
//
//   x_q = clamp(rint(y * (1 / scale)), -127, 127)
//
// y is x itself (quantize_int8), group norm with or without SiLU, layer norm, or a gated GELU.
// A dynamic scale is max(absmax(y), 1e-8) / 127 of the tensor or of each row, and is written.
#pragma once

#include <cstdint>

#include "activation_kernels.h"

namespace ptq4adm {

enum class QuantizeStatus : int {
  kOk = 0,
  kNonFinite = 1,   // NaN or infinity was met; x_q is garbage
  kOutOfTable = 2,  // step lies outside the table of scales; nothing was written
};

// Where the result goes, and which scale it has.
struct QuantizedOutput {
  const float* table;  // static scales; null measures the scale
  int64_t table_size;
  const int64_t* step;  // row of the table in use; null for row 0, as with a table of one
  float* scale;         // written: one float, or one a row
  int8_t* x_q;          // contiguous
};

// x [rows, columns], rows `row_stride` apart.
struct Matrix {
  const float* x;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
};

QuantizeStatus quantize_int8(const ActivationKernels& kernels, const Matrix& matrix,
                             bool is_per_row, const QuantizedOutput& out, int64_t threads);

// x [batch, pixels, channels]: a channels-last image, its samples and pixels at any stride.
struct GroupNorm {
  const float* x;
  int64_t batch, pixels, channels;
  int64_t batch_stride, pixel_stride;
  int64_t groups;       // divides channels
  const float* weight;  // [channels]
  const float* bias;    // [channels]
  double eps;
  bool is_silu;
};

// One scale for the tensor.
QuantizeStatus groupnorm_silu_quantize(const ActivationKernels& kernels, const GroupNorm& norm,
                                       const QuantizedOutput& out, int64_t threads);

// One scale a row, or a static one. weight and bias [columns].
QuantizeStatus layernorm_quantize(const ActivationKernels& kernels, const Matrix& matrix,
                                  const float* weight, const float* bias, double eps,
                                  const QuantizedOutput& out, int64_t threads);

// matrix [M, 2 K], values then gates: x_q [M, K]. One scale a row, or a static one.
QuantizeStatus geglu_quantize(const ActivationKernels& kernels, const Matrix& matrix,
                              const QuantizedOutput& out, int64_t threads);

}  // namespace ptq4adm
