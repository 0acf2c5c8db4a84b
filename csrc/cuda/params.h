// What a matrix product is told: sizes, addresses and options, passed to the kernel by value.
//
//   acc[m, n] = sum_k x_q[m, k] * w_q[n, k]                                            exact int32
//   y[m, n]   = (acc1 * x_scale1 [+ acc2 * x_scale2]) * w_scale[n]
//               + bias[n] (+ temb[m / rows_per_sample, n]) (+ residual[m, n])          float32
//
// then optionally value * gelu(gate), optionally quantized. Every rounding is that of
// ptq4adm/ops/reference.py, in its order.

#pragma once

#include <cstdint>

namespace ptq4adm {

enum class Dtype : int32_t { kFloat32, kFloat16, kBfloat16, kInt8, kInt32 };

// What a scale's elements are.
enum class ScaleForm : int32_t { kNone, kOne, kTable, kRow };

struct Scale {
  const float* values;
  ScaleForm form;
  int32_t table_size;
};

// A tensor that is added to the result.
struct Term {
  const void* values;  // null: not there
  Dtype dtype;         // a float
};

enum class Enlargement : int32_t { kNone, kDouble, kAny };

// Where the pixels of a convolution lie. A product of rows has none of it.
struct Window {
  int32_t height, width;          // of the image in memory
  int32_t rows, columns;          // after nearest upsampling
  int32_t out_height, out_width;  //
  int32_t kernel_width;           // kernel rows follow from the number of taps
  int32_t stride[2], padding[2], dilation[2];
  Enlargement enlargement;
};

// Segments of K are numbered 0 and 1; the second may be absent.
struct Params {
  // the product
  const int8_t* x[2];     // [M, channels] or NHWC; null for an absent segment
  const void* qweight;    // order `cuda`
  const uint8_t* w_mult;  // [N in whole sixteens, blocks of both segments], or null
  int32_t M, N;
  int32_t channels[2];  // of a row or pixel
  int32_t blocks[2];    // of 64 k over all taps
  bool is_x_aligned;    // rows begin at multiples of 16 bytes
  Window window;

  // several blocks may share the k of a tile
  int32_t splits;        // of all k
  int32_t first_splits;  // of them, those of the first segment
  int32_t* slabs;        // [splits, tiles, tile]; only with splits > 1
  int32_t* counters;     // [tiles], zero before and after

  // the result
  Scale x_scale[2];
  const float* w_scale;  // [N]
  const int64_t* step;   // row of every table
  Term bias, temb, residual;
  int32_t rows_per_sample;
  bool is_gated;  // first half of the channels times gelu of the second: N / 2 in multiples of 16,
                  // and no kInt32
  Scale out_scale;
  void* out[2];  // [M, N] (N / 2 if gated); the second is of kInt32 with two segments
  Dtype out_dtype;
  bool is_wide;  // rows of every tensor of the result are whole fours, and begin at multiples of 16
                 // bytes (float32), 8 (float16, bfloat16) or 4 (int8)
};

}  // namespace ptq4adm
