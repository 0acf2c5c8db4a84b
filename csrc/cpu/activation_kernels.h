// The inner loops over float32 activations, one table of functions per instruction set: norms,
// gates and the quantization x_q = clamp(rint(x * (1 / scale)), -127, 127).
//
// A function that returns uint32_t returns the largest |value| it produced, as bits: patterns of
// positive floats order like the floats, and from kActivationInfinity on they are infinity or NaN.
// No address needs an alignment.
#pragma once

#include <cstdint>

namespace ptq4adm {

constexpr float kLargestInt8 = 127.0f;
constexpr uint32_t kActivationInfinity = 0x7f800000u;  // |x| >= this, as bits: infinity or NaN

// y = (x - shift) * gain + offset, every array as long as the row: one row of a group norm.
// Subtracting the mean first keeps y exact where |mean| is large against the deviation.
struct AffineRow {
  const float* x;
  const float* shift;
  const float* gain;
  const float* offset;
};

// y = ((x - mean) * rstd + correction) * weight + bias: one row of a layer norm. `correction` is
// what rounding the mean to float32 took away.
struct NormalizedRow {
  const float* x;
  const float* weight;
  const float* bias;
  float mean;
  float rstd;
  float correction;
};

// What a column of numbers is known by; the kernels add to it.
struct ColumnMoments {
  double* sum;
  double* squares;  // sum of x * x
  float* low;
  float* high;
};

struct RowMoments {
  float shift;     // near the mean
  double sum;      // of x - shift
  double squares;  // of (x - shift)^2
};

struct ActivationKernels {
  const char* name;

  uint32_t (*absmax_bits)(const float* x, int64_t count);
  // Bit-equal in every instruction set; the largest |x| is taken before scaling.
  uint32_t (*quantize)(const float* x, int64_t count, float inverse_scale, int8_t* x_q);

  RowMoments (*row_moments)(const float* x, int64_t count);
  // Adds `rows` rows of `columns` numbers, `stride` apart, to the moments of their columns.
  void (*column_moments)(const float* x, int64_t rows, int64_t stride, int64_t columns,
                         const ColumnMoments& moments);

  uint32_t (*affine_absmax_bits)(const AffineRow& row, int64_t count, bool is_silu);
  // For rows that are known to give finite numbers.
  void (*affine_quantize)(const AffineRow& row, int64_t count, bool is_silu, float inverse_scale,
                          int8_t* x_q);
  uint32_t (*normalize)(const NormalizedRow& row, int64_t count, float* y);
  // y = value * gelu(gate). NaN and infinity in `gate` count as produced.
  uint32_t (*geglu)(const float* value, const float* gate, int64_t count, float* y);

  void (*silu)(const float* x, int64_t count, float* y);
  void (*gelu)(const float* x, int64_t count, float* y);
};

const ActivationKernels& scalar_activation_kernels();
// Null where the file was not compiled for the instruction set.
const ActivationKernels* avx2_activation_kernels();    // AVX2 and FMA
const ActivationKernels* avx512_activation_kernels();  // AVX-512 F, BW, DQ, VL

// The kernels for "auto", "avx512_vnni", "avx_vnni", "avx2" or "scalar": the names of the matrix
// products. The first two run AVX-512 and AVX2 loops. Throws std::invalid_argument for another name
// and std::runtime_error for an instruction set that this processor or this build lacks.
const ActivationKernels& select_activation_kernels(const char* isa);

}  // namespace ptq4adm
