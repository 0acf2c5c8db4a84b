// The loops of activation_kernels.h, written once over a vector type (vector_math.h). Everything
// here has internal linkage: each instruction set's file compiles its own copy, so the linker can
// never put AVX code where the portable kernels call it.
#pragma once

#include <cstdint>

#include "activation_kernels.h"
#include "vector_math.h"

namespace ptq4adm {
namespace {

// Float sums of a column run over this many rows before they are added in double.
constexpr int64_t kMomentRows = 32;
// Columns side by side, so that sums of independent columns hide each other's latency.
constexpr int64_t kMomentVectors = 4;
// Float sums of a row: lanes * 64 numbers, at most 1024, before they are added in double.
constexpr int64_t kMomentSteps = 64;
// Numbers of a row whose mean the others are taken relative to; a multiple of every width.
constexpr int64_t kGuess = 128;

// --- where values come from: at(i, read) is the vector at position i -----------------------------

template <class V>
struct Values {
  const float* x;

  template <class Read>
  typename V::Float at(int64_t i, Read read) const {
    return read(x + i);
  }
};

template <class V, bool kSilu>
struct Affine {
  const AffineRow row;  // a copy: bytes stored to x_q could alias the caller's

  template <class Read>
  typename V::Float at(int64_t i, Read read) const {
    const typename V::Float centered = V::sub(read(row.x + i), read(row.shift + i));
    const typename V::Float y = V::multiply_add(centered, read(row.gain + i), read(row.offset + i));
    return kSilu ? silu_of<V>(y) : y;
  }
};

template <class V>
struct Normalized {
  const NormalizedRow row;

  template <class Read>
  typename V::Float at(int64_t i, Read read) const {
    const typename V::Float centered = V::sub(read(row.x + i), V::set(row.mean));
    const typename V::Float y = V::multiply_add(centered, V::set(row.rstd), V::set(row.correction));
    return V::multiply_add(y, read(row.weight + i), read(row.bias + i));
  }
};

template <class V, bool kGelu>
struct Activated {
  const float* x;

  template <class Read>
  typename V::Float at(int64_t i, Read read) const {
    const typename V::Float value = read(x + i);
    return kGelu ? gelu_of<V>(value) : silu_of<V>(value);
  }
};

template <class V>
struct Gated {
  const float* value;
  const float* gate;
  typename V::Bits& gates;  // running maximum: gelu turns -infinity into 0

  template <class Read>
  typename V::Float at(int64_t i, Read read) const {
    const typename V::Float g = read(gate + i);
    gates = V::max_magnitude(gates, g);
    return V::mul(read(value + i), gelu_of<V>(g));
  }
};

// Calls full(i, vector) for whole vectors and last(i, vector, lanes) for the rest.
template <class V, class Source, class Full, class Last>
void for_each_vector(const Source& source, int64_t count, const Full& full, const Last& last) {
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) {
    full(i, source.at(i, [](const float* p) { return V::load(p); }));
  }
  if (i < count) {
    const int64_t lanes = count - i;
    last(i, source.at(i, [lanes](const float* p) { return V::load_first(p, lanes); }), lanes);
  }
}

// --- what is done with them ----------------------------------------------------------------------

template <class V, class Source>
uint32_t largest_of(const Source& source, int64_t count) {
  typename V::Bits bits = V::no_magnitude();
  const auto note = [&](int64_t, typename V::Float value) { bits = V::max_magnitude(bits, value); };
  for_each_vector<V>(source, count, note,
                     [&](int64_t i, typename V::Float value, int64_t) { note(i, value); });
  return V::largest(bits);
}

// Returns the largest magnitude where kWatch asks for it, else 0.
template <class V, bool kWatch, class Source>
uint32_t quantize_from(const Source& source, int64_t count, float inverse_scale, int8_t* x_q) {
  using F = typename V::Float;
  const F factor = V::set(inverse_scale);
  const F upper = V::set(kLargestInt8), lower = V::set(-kLargestInt8);
  typename V::Bits bits = V::no_magnitude();
  const auto scaled = [&](F value) {
    if (kWatch) bits = V::max_magnitude(bits, value);
    return V::max(V::min(V::mul(value, factor), upper), lower);
  };
  for_each_vector<V>(
      source, count, [&](int64_t i, F value) { V::store_int8(x_q + i, scaled(value)); },
      [&](int64_t i, F value, int64_t lanes) {
        V::store_int8_first(x_q + i, scaled(value), lanes);
      });
  return V::largest(bits);
}

template <class V, class Source>
uint32_t store_from(const Source& source, int64_t count, float* y) {
  using F = typename V::Float;
  typename V::Bits bits = V::no_magnitude();
  for_each_vector<V>(
      source, count,
      [&](int64_t i, F value) {
        bits = V::max_magnitude(bits, value);
        V::store(y + i, value);
      },
      [&](int64_t i, F value, int64_t lanes) {
        bits = V::max_magnitude(bits, value);
        V::store_first(y + i, value, lanes);
      });
  return V::largest(bits);
}

// --- moments -------------------------------------------------------------------------------------

// The mean of the first kGuess numbers of a row: the sum of squares about it is at most
// 1 + count / kGuess times that about the mean of the row.
template <class V>
float first_mean(const float* x, int64_t count) {
  if (count < kGuess) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += x[i];
    return count > 0 ? sum / static_cast<float>(count) : 0.0f;
  }
  typename V::Float sum = V::load(x);
  for (int64_t i = V::kWidth; i < kGuess; i += V::kWidth) sum = V::add(sum, V::load(x + i));
  return V::sum(sum) * (1.0f / kGuess);
}

template <class V>
RowMoments row_moments(const float* x, int64_t count) {
  using F = typename V::Float;
  RowMoments moments{first_mean<V>(x, count), 0.0, 0.0};
  const F center = V::set(moments.shift);
  const auto add = [&](F& sum, F& squares, const float* p) {
    const F centered = V::sub(V::load(p), center);
    sum = V::add(sum, centered);
    squares = V::multiply_add(centered, centered, squares);
  };
  int64_t i = 0;
  while (count - i >= V::kWidth) {
    // two of each, so that one sum's latency hides the other's
    F sum = V::set(0.0f), squares = sum, other_sum = sum, other_squares = sum;
    const int64_t vectors = (count - i) / V::kWidth;
    const int64_t steps = vectors < kMomentSteps ? vectors : kMomentSteps;
    for (int64_t step = 0; step + 2 <= steps; step += 2, i += 2 * V::kWidth) {
      add(sum, squares, x + i);
      add(other_sum, other_squares, x + i + V::kWidth);
    }
    if (steps % 2 != 0) {
      add(sum, squares, x + i);
      i += V::kWidth;
    }
    moments.sum += static_cast<double>(V::sum(V::add(sum, other_sum)));
    moments.squares += static_cast<double>(V::sum(V::add(squares, other_squares)));
  }
  for (; i < count; ++i) {
    const double centered = static_cast<double>(x[i] - moments.shift);
    moments.sum += centered;
    moments.squares += centered * centered;
  }
  return moments;
}

template <class V>
void add_lanes(const float* shift, const float* sum, const float* squares, int64_t rows,
               int64_t columns, const ColumnMoments& moments) {
  const double n = static_cast<double>(rows);
  for (int64_t c = 0; c < columns; ++c) {
    const double s = shift[c], d = sum[c];
    moments.sum[c] += n * s + d;
    moments.squares[c] += static_cast<double>(squares[c]) + s * (2.0 * d + n * s);
  }
}

// One block of at most kMomentRows rows and kVectors vectors of columns. Numbers are taken relative
// to the block's first row: the sum of their squares is then at most 1 + rows times the sum about
// the mean, whatever the mean is, so float32 loses little; the rest is exact in double.
template <class V, int64_t kVectors, class Read>
void moments_block(const float* x, int64_t rows, int64_t stride, int64_t columns, Read read,
                   const ColumnMoments& moments) {
  using F = typename V::Float;
  F shift[kVectors], sum[kVectors], squares[kVectors], low[kVectors], high[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    shift[v] = low[v] = high[v] = read(x + v * V::kWidth);
    sum[v] = squares[v] = V::set(0.0f);
  }
  for (int64_t row = 1; row < rows; ++row) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const F value = read(x + row * stride + v * V::kWidth);
      const F centered = V::sub(value, shift[v]);
      sum[v] = V::add(sum[v], centered);
      squares[v] = V::multiply_add(centered, centered, squares[v]);
      low[v] = V::min(low[v], value);
      high[v] = V::max(high[v], value);
    }
  }
  float lanes[5][kVectors * V::kWidth];
  for (int64_t v = 0; v < kVectors; ++v) {
    V::store(lanes[0] + v * V::kWidth, shift[v]);
    V::store(lanes[1] + v * V::kWidth, sum[v]);
    V::store(lanes[2] + v * V::kWidth, squares[v]);
    V::store(lanes[3] + v * V::kWidth, low[v]);
    V::store(lanes[4] + v * V::kWidth, high[v]);
  }
  add_lanes<V>(lanes[0], lanes[1], lanes[2], rows, columns, moments);
  for (int64_t c = 0; c < columns; ++c) {
    moments.low[c] = lanes[3][c] < moments.low[c] ? lanes[3][c] : moments.low[c];
    moments.high[c] = lanes[4][c] > moments.high[c] ? lanes[4][c] : moments.high[c];
  }
}

ColumnMoments from_column(const ColumnMoments& moments, int64_t c) {
  return {moments.sum + c, moments.squares + c, moments.low + c, moments.high + c};
}

template <class V>
void column_moments(const float* x, int64_t rows, int64_t stride, int64_t columns,
                    const ColumnMoments& moments) {
  constexpr int64_t kWide = kMomentVectors * V::kWidth;
  const auto load = [](const float* p) { return V::load(p); };
  for (int64_t first = 0; first < rows; first += kMomentRows, x += kMomentRows * stride) {
    const int64_t n = rows - first < kMomentRows ? rows - first : kMomentRows;
    int64_t c = 0;
    for (; c + kWide <= columns; c += kWide) {
      moments_block<V, kMomentVectors>(x + c, n, stride, kWide, load, from_column(moments, c));
    }
    for (; c + V::kWidth <= columns; c += V::kWidth) {
      moments_block<V, 1>(x + c, n, stride, V::kWidth, load, from_column(moments, c));
    }
    if (c < columns) {
      const int64_t lanes = columns - c;
      const auto load_first = [lanes](const float* p) { return V::load_first(p, lanes); };
      moments_block<V, 1>(x + c, n, stride, lanes, load_first, from_column(moments, c));
    }
  }
}

// --- the table -----------------------------------------------------------------------------------

template <class V>
struct Loops {
  static uint32_t absmax_bits(const float* x, int64_t count) {
    return largest_of<V>(Values<V>{x}, count);
  }

  static uint32_t quantize(const float* x, int64_t count, float inverse_scale, int8_t* x_q) {
    return quantize_from<V, true>(Values<V>{x}, count, inverse_scale, x_q);
  }

  static uint32_t affine_absmax_bits(const AffineRow& row, int64_t count, bool is_silu) {
    return is_silu ? largest_of<V>(Affine<V, true>{row}, count)
                   : largest_of<V>(Affine<V, false>{row}, count);
  }

  static void affine_quantize(const AffineRow& row, int64_t count, bool is_silu,
                              float inverse_scale, int8_t* x_q) {
    if (is_silu) {
      quantize_from<V, false>(Affine<V, true>{row}, count, inverse_scale, x_q);
    } else {
      quantize_from<V, false>(Affine<V, false>{row}, count, inverse_scale, x_q);
    }
  }

  static uint32_t normalize(const NormalizedRow& row, int64_t count, float* y) {
    return store_from<V>(Normalized<V>{row}, count, y);
  }

  static uint32_t geglu(const float* value, const float* gate, int64_t count, float* y) {
    typename V::Bits gates = V::no_magnitude();
    const uint32_t produced = store_from<V>(Gated<V>{value, gate, gates}, count, y);
    const uint32_t largest_gate = V::largest(gates);
    return largest_gate >= kActivationInfinity ? largest_gate : produced;
  }

  static void silu(const float* x, int64_t count, float* y) {
    store_from<V>(Activated<V, false>{x}, count, y);
  }

  static void gelu(const float* x, int64_t count, float* y) {
    store_from<V>(Activated<V, true>{x}, count, y);
  }

  static const ActivationKernels& table(const char* name) {
    static const ActivationKernels kernels{name,
                                           absmax_bits,
                                           quantize,
                                           row_moments<V>,
                                           column_moments<V>,
                                           affine_absmax_bits,
                                           affine_quantize,
                                           normalize,
                                           geglu,
                                           silu,
                                           gelu};
    return kernels;
  }
};

}  // namespace
}  // namespace ptq4adm
