// W4A8 and W8A8 matrix products over NHWC activations: linear layers and convolutions alike.
//
//   acc[m, n] = sum_k x_q[m, k] * w_q[n, k]                                    exact int32
//   y[m, n]   = (acc1 * x_scale1 [+ acc2 * x_scale2]) * w_scale[n] + bias[n] (+ temb) (+ residual)
//   optionally y[m, n] * gelu(y[m, n + N / 2]), optionally quantized with a static scale
//
// A linear layer is a 1 x 1 convolution over M images of one pixel. K order, its
// padding to multiples of 64 and the two segments: ptq4adm/packing/layout.py.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "activation_kernels.h"
#include "kernels.h"

namespace ptq4adm {

using Pair = std::array<int64_t, 2>;  // (rows, columns), or one value per K segment

// Sizes of one layer, with the tables that follow from them. Immutable after construction.
struct Conv2dShape {
  int64_t batch, height, width;  // of the activations in memory
  Pair channels;                 // of each K segment; 0 for a segment that is not there
  int64_t out_channels;          // N
  Pair kernel_size, stride, padding, dilation;
  Pair upsample;  // size the input is enlarged to; its own size for none
  Pair out_size;
  std::vector<int64_t> source_row, source_column;  // enlarged index -> index in memory

  Conv2dShape(std::array<int64_t, 3> size, Pair channels, int64_t out_channels, Pair kernel_size,
              Pair stride, Pair padding, Pair dilation, Pair upsample, Pair out_size);

  int64_t rows() const { return batch * out_size[0] * out_size[1]; }  // M
  int64_t taps() const { return kernel_size[0] * kernel_size[1]; }
  int64_t channels_padded(int segment) const;
  int64_t k_padded(int segment) const { return taps() * channels_padded(segment); }
  int64_t k_padded() const { return k_padded(0) + k_padded(1); }
};

enum class Output { kFloat32, kInt8, kInt32 };

struct MatmulCall {
  int bits;                 // 4 or 8, of the weight
  const int8_t* x_q[2];     // NHWC, one a segment; the second may be null
  const void* qweight;      // cpu order
  const uint8_t* w_mult;    // [N, Kp / 64], or null
  const float* w_scale;     // [N]
  const float* x_scale[2];  // one float, or one a row
  bool is_x_scale_per_row[2];
  const float* bias;  // [N], or null
  const float* temb;  // [temb_rows, N], or null
  int64_t temb_rows;
  const float* residual;   // [M, N], or null
  bool is_geglu;           // result [M, N / 2]: first half * gelu(second half); N / 2 in
                           // multiples of 16
  const float* out_scale;  // one float, for kInt8
  void* out[2];            // [M, N]; kInt32 writes one a segment, the others only the first
  Output output;
};

// Returns false if an int8 output met NaN or infinity (the output is then garbage).
bool matmul(const Kernels& kernels, const ActivationKernels& activations, const Conv2dShape& shape,
            const MatmulCall& call, int64_t threads);

}  // namespace ptq4adm
