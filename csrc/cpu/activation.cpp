// Row by row: quantization alone, layer norm and gated GELU. The group norm is in groupnorm.cpp.

#include "activation.h"

#include <cmath>
#include <limits>
#include <vector>

#include "activation_common.h"
#include "parallel.h"

namespace ptq4adm {
namespace {

constexpr int64_t kRowsTogether = 4;

// Rows that together are about one task long.
int64_t rows_per_task(int64_t columns) {
  return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, columns));
}

// Calls work(row, thread) for every row, tasks of neighbouring rows spread over threads.
template <typename Work>
void for_each_row(int64_t rows, int64_t columns, int64_t threads, const Work& work) {
  const int64_t step = rows_per_task(columns);
  parallel_for(ceil_div(rows, step), threads, [&](int64_t task, int64_t thread) {
    const int64_t end = std::min(rows, (task + 1) * step);
    for (int64_t row = task * step; row < end; ++row) work(row, thread);
  });
}

QuantizeStatus quantize_tensor(const ActivationKernels& kernels, Matrix matrix,
                               const QuantizedOutput& out, int64_t threads) {
  const int64_t count = matrix.rows * matrix.columns;
  if (matrix.row_stride == matrix.columns) {
    // contiguous: any cut into rows will do, and the last may be shorter
    matrix.columns = matrix.row_stride = std::min(std::max<int64_t>(1, count), kTaskElements);
    matrix.rows = ceil_div(count, matrix.columns);
  }
  const auto width = [&](int64_t row) {
    return std::min(matrix.columns, count - row * matrix.columns);
  };
  Largest largest;
  if (out.table == nullptr) {
    for_each_row(matrix.rows, matrix.columns, threads, [&](int64_t row, int64_t) {
      largest.raise_to(kernels.absmax_bits(matrix.x + row * matrix.row_stride, width(row)));
    });
    if (largest.status() != QuantizeStatus::kOk) return largest.status();
    *out.scale = dynamic_scale(as_float(largest.bits()));
  }
  const float inverse_scale = 1.0f / *out.scale;
  for_each_row(matrix.rows, matrix.columns, threads, [&](int64_t row, int64_t) {
    largest.raise_to(kernels.quantize(matrix.x + row * matrix.row_stride, width(row), inverse_scale,
                                      out.x_q + row * matrix.columns));
  });
  return largest.status();
}

// Quantizes rows that `produce(row, y)` makes: y float32 [columns], returning its largest |y|.
// kRowsTogether are made before the first is quantized: a row's sums and scale are short chains of
// slow instructions, which those of its neighbours then hide.
template <typename Produce>
QuantizeStatus quantize_rows(const ActivationKernels& kernels, int64_t rows, int64_t columns,
                             const QuantizedOutput& out, int64_t threads, const Produce& produce) {
  const int64_t step = ceil_div(rows_per_task(columns), kRowsTogether) * kRowsTogether;
  std::vector<float> scratch(
      static_cast<size_t>(std::max<int64_t>(1, threads) * kRowsTogether * columns));
  const bool is_static = out.table != nullptr;
  Largest largest;
  parallel_for(ceil_div(rows, step), threads, [&](int64_t task, int64_t thread) {
    float* y = scratch.data() + thread * kRowsTogether * columns;
    const int64_t end = std::min(rows, (task + 1) * step);
    uint32_t task_largest = 0;
    for (int64_t first = task * step; first < end; first += kRowsTogether) {
      const int64_t together = std::min(kRowsTogether, end - first);
      float inverse_scale[kRowsTogether];
      for (int64_t i = 0; i < together; ++i) {
        const uint32_t bits = produce(first + i, y + i * columns);
        task_largest = std::max(task_largest, bits);
        float* scale = out.scale + (is_static ? 0 : first + i);
        if (!is_static) *scale = dynamic_scale(as_float(bits));
        inverse_scale[i] = 1.0f / *scale;
      }
      for (int64_t i = 0; i < together; ++i) {
        kernels.quantize(y + i * columns, columns, inverse_scale[i],
                         out.x_q + (first + i) * columns);
      }
    }
    largest.raise_to(task_largest);
  });
  return largest.status();
}

// One row's mean and deviation.
NormalizedRow measured(const ActivationKernels& kernels, const float* x, int64_t count,
                       double eps) {
  const double n = static_cast<double>(std::max<int64_t>(1, count));
  const RowMoments moments = kernels.row_moments(x, count);
  const double rest = moments.sum / n;
  const double variance = moments.squares / n - rest * rest;
  // an infinite variance would turn the row into its bias: NaN is noticed instead
  const double rstd = std::isfinite(variance) ? 1.0 / std::sqrt(std::max(0.0, variance) + eps)
                                              : std::numeric_limits<double>::quiet_NaN();
  NormalizedRow row{};
  row.x = x;
  row.mean = moments.shift;
  row.rstd = static_cast<float>(rstd);
  row.correction = static_cast<float>(-rest * rstd);
  return row;
}

}  // namespace

QuantizeStatus quantize_int8(const ActivationKernels& kernels, const Matrix& matrix,
                             bool is_per_row, const QuantizedOutput& out, int64_t threads) {
  if (!read_static_scale(out)) return QuantizeStatus::kOutOfTable;
  if (!is_per_row || out.table != nullptr) return quantize_tensor(kernels, matrix, out, threads);
  Largest largest;
  for_each_row(matrix.rows, matrix.columns, threads, [&](int64_t row, int64_t) {
    const float* x = matrix.x + row * matrix.row_stride;
    const uint32_t bits = kernels.absmax_bits(x, matrix.columns);
    largest.raise_to(bits);
    if (bits >= kActivationInfinity) return;
    out.scale[row] = dynamic_scale(as_float(bits));
    kernels.quantize(x, matrix.columns, 1.0f / out.scale[row], out.x_q + row * matrix.columns);
  });
  return largest.status();
}

QuantizeStatus layernorm_quantize(const ActivationKernels& kernels, const Matrix& matrix,
                                  const float* weight, const float* bias, double eps,
                                  const QuantizedOutput& out, int64_t threads) {
  if (!read_static_scale(out)) return QuantizeStatus::kOutOfTable;
  const auto produce = [&](int64_t index, float* y) {
    const float* x = matrix.x + index * matrix.row_stride;
    NormalizedRow row = measured(kernels, x, matrix.columns, eps);
    row.weight = weight;
    row.bias = bias;
    return kernels.normalize(row, matrix.columns, y);
  };
  return quantize_rows(kernels, matrix.rows, matrix.columns, out, threads, produce);
}

QuantizeStatus geglu_quantize(const ActivationKernels& kernels, const Matrix& matrix,
                              const QuantizedOutput& out, int64_t threads) {
  if (!read_static_scale(out)) return QuantizeStatus::kOutOfTable;
  const int64_t columns = matrix.columns / 2;
  const auto produce = [&](int64_t index, float* y) {
    const float* value = matrix.x + index * matrix.row_stride;
    return kernels.geglu(value, value + columns, columns, y);
  };
  return quantize_rows(kernels, matrix.rows, columns, out, threads, produce);
}

}  // namespace ptq4adm
