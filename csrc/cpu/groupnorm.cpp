// Group norm, SiLU and quantization of a channels-last image in two passes over memory.
//
// The first pass takes sum, sum of squares, smallest and largest number of every channel. They give
// the norm, and with it the smallest and largest y of a channel. |silu(y)| between two y is largest
// at one of them unless it is below 0.2785 everywhere, so they give a dynamic scale without another
// pass. The second pass writes int8.

#include <cmath>
#include <initializer_list>
#include <limits>
#include <vector>

#include "activation.h"
#include "activation_common.h"
#include "parallel.h"

namespace ptq4adm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kShortRow = 256;      // fewer channels: several pixels make one row
constexpr float kSiluDepth = 0.27847f;  // silu(y) >= -0.278465 for every y

// How an image is cut: parts of a sample are tasks, rows are what the kernels are called with.
struct Cut {
  int64_t row_pixels;
  int64_t columns;      // numbers in a row
  int64_t part_pixels;  // a multiple of row_pixels
  int64_t parts;        // of a sample

  explicit Cut(const GroupNorm& norm) {
    const bool is_dense = norm.pixel_stride == norm.channels;
    row_pixels = is_dense ? std::max<int64_t>(1, kShortRow / norm.channels) : 1;
    row_pixels = std::min(row_pixels, norm.pixels);
    columns = row_pixels * norm.channels;
    part_pixels = row_pixels * std::max<int64_t>(1, kTaskElements / columns);
    parts = ceil_div(norm.pixels, part_pixels);
  }
};

// Moments of every column of every part.
class Moments {
 public:
  Moments(int64_t parts, int64_t columns)
      : columns_(columns),
        sum_(static_cast<size_t>(parts * columns)),
        squares_(sum_.size()),
        low_(sum_.size(), kInfinity),
        high_(sum_.size(), -kInfinity) {}

  ColumnMoments of_part(int64_t part) {
    const int64_t first = part * columns_;
    return {sum_.data() + first, squares_.data() + first, low_.data() + first,
            high_.data() + first};
  }

 private:
  int64_t columns_;
  std::vector<double> sum_, squares_;
  std::vector<float> low_, high_;
};

// y = (x - shift) * gain + offset for every number of a row, [batch, columns].
struct Affines {
  std::vector<float> shift, gain, offset;

  Affines(int64_t batch, int64_t columns)
      : shift(static_cast<size_t>(batch * columns)), gain(shift.size()), offset(shift.size()) {}

  AffineRow row(const float* x, int64_t first) const {
    return {x, shift.data() + first, gain.data() + first, offset.data() + first};
  }
};

void measure_part(const ActivationKernels& kernels, const GroupNorm& norm, const Cut& cut,
                  int64_t task, const ColumnMoments& moments) {
  const int64_t first = (task % cut.parts) * cut.part_pixels;
  const int64_t pixels = std::min(cut.part_pixels, norm.pixels - first);
  const int64_t rows = pixels / cut.row_pixels, rest = pixels % cut.row_pixels;
  const int64_t stride = cut.row_pixels * norm.pixel_stride;
  const float* x = norm.x + (task / cut.parts) * norm.batch_stride + first * norm.pixel_stride;
  kernels.column_moments(x, rows, stride, cut.columns, moments);
  if (rest > 0) {
    kernels.column_moments(x + rows * stride, 1, stride, rest * norm.channels, moments);
  }
}

template <typename T, typename Combine>
void combine(T* total, const T* more, int64_t count, const Combine& with) {
  for (int64_t i = 0; i < count; ++i) total[i] = with(total[i], more[i]);
}

// Combines the moments of a sample's parts and of a row's pixels, into the first channels of the
// first part.
void fold(const GroupNorm& norm, const Cut& cut, int64_t sample, Moments& moments) {
  const ColumnMoments total = moments.of_part(sample * cut.parts);
  for (int64_t part = 0; part < cut.parts; ++part) {
    const ColumnMoments more = moments.of_part(sample * cut.parts + part);
    for (int64_t i = part == 0 ? norm.channels : 0; i < cut.columns; i += norm.channels) {
      combine(total.sum, more.sum + i, norm.channels, [](double a, double b) { return a + b; });
      combine(total.squares, more.squares + i, norm.channels,
              [](double a, double b) { return a + b; });
      combine(total.low, more.low + i, norm.channels,
              [](float a, float b) { return b < a ? b : a; });
      combine(total.high, more.high + i, norm.channels,
              [](float a, float b) { return b > a ? b : a; });
    }
  }
}

// Norms one group of one sample. A variance that is not finite gives NaN.
void set_group(const GroupNorm& norm, const ColumnMoments& total, int64_t group, float* shift,
               float* gain, float* offset) {
  const int64_t size = norm.channels / norm.groups;
  const int64_t first = group * size, end = first + size;
  double sum = 0.0, squares = 0.0;
  for (int64_t c = first; c < end; ++c) {
    sum += total.sum[c];
    squares += total.squares[c];
  }
  const double count = static_cast<double>(size * norm.pixels);
  const double mean = sum / count;
  const double variance = squares / count - mean * mean;
  // an infinite variance would turn every number into the bias
  const float rstd = std::isfinite(variance)
                         ? static_cast<float>(1.0 / std::sqrt(std::max(0.0, variance) + norm.eps))
                         : std::numeric_limits<float>::quiet_NaN();
  const float rounded_mean = static_cast<float>(mean);
  const float rest = static_cast<float>(mean - static_cast<double>(rounded_mean));
  for (int64_t c = first; c < end; ++c) {
    shift[c] = rounded_mean;
    gain[c] = rstd * norm.weight[c];
    offset[c] = norm.bias[c] - rest * gain[c];
  }
}

void set_affines(const GroupNorm& norm, const Cut& cut, Moments& moments, Affines& affines) {
  for (int64_t sample = 0; sample < norm.batch; ++sample) {
    fold(norm, cut, sample, moments);
    const ColumnMoments total = moments.of_part(sample * cut.parts);
    float* const arrays[3] = {affines.shift.data() + sample * cut.columns,
                              affines.gain.data() + sample * cut.columns,
                              affines.offset.data() + sample * cut.columns};
    for (int64_t group = 0; group < norm.groups; ++group) {
      set_group(norm, total, group, arrays[0], arrays[1], arrays[2]);
    }
    for (float* array : arrays) {  // the same for every pixel of a row
      for (int64_t i = norm.channels; i < cut.columns; ++i) array[i] = array[i - norm.channels];
    }
  }
}

// Largest |y| (or |silu(y)|) at the smallest and the largest x of every channel, as bits. All y are
// finite if these are: the variance is finite only if every x is, and y lies between them.
uint32_t largest_at_extremes(const ActivationKernels& kernels, const GroupNorm& norm,
                             const Cut& cut, Moments& moments, const Affines& affines,
                             bool is_silu) {
  uint32_t largest = 0;
  for (int64_t sample = 0; sample < norm.batch; ++sample) {
    const ColumnMoments total = moments.of_part(sample * cut.parts);
    for (const float* x : {total.low, total.high}) {
      const AffineRow row = affines.row(x, sample * cut.columns);
      largest = std::max(largest, kernels.affine_absmax_bits(row, norm.channels, is_silu));
    }
  }
  return largest;
}

// Calls work(row, numbers, pixel) for every row of the image. The parts run backwards: what the
// first pass read last is still in the cache.
template <typename Work>
void for_each_row(const GroupNorm& norm, const Cut& cut, const Affines& affines, int64_t threads,
                  const Work& work) {
  const int64_t tasks = norm.batch * cut.parts;
  parallel_for(tasks, threads, [&](int64_t index, int64_t) {
    const int64_t task = tasks - 1 - index;
    const int64_t sample = task / cut.parts;
    const int64_t first = (task % cut.parts) * cut.part_pixels;
    const int64_t end = std::min(norm.pixels, first + cut.part_pixels);
    for (int64_t pixel = first; pixel < end; pixel += cut.row_pixels) {
      const float* x = norm.x + sample * norm.batch_stride + pixel * norm.pixel_stride;
      const int64_t numbers = std::min(cut.row_pixels, end - pixel) * norm.channels;
      const AffineRow row = affines.row(x, sample * cut.columns);
      work(row, numbers, sample * norm.pixels + pixel);
    }
  });
}

// Largest |silu(y)|.
float silu_absmax(const ActivationKernels& kernels, const GroupNorm& norm, const Cut& cut,
                  Moments& moments, const Affines& affines, int64_t threads) {
  const float at_extremes =
      as_float(largest_at_extremes(kernels, norm, cut, moments, affines, true));
  if (at_extremes >= kSiluDepth) return at_extremes;
  Largest largest;
  for_each_row(norm, cut, affines, threads, [&](const AffineRow& row, int64_t numbers, int64_t) {
    largest.raise_to(kernels.affine_absmax_bits(row, numbers, true));
  });
  return as_float(largest.bits());
}

}  // namespace

QuantizeStatus groupnorm_silu_quantize(const ActivationKernels& kernels, const GroupNorm& norm,
                                       const QuantizedOutput& out, int64_t threads) {
  if (!read_static_scale(out)) return QuantizeStatus::kOutOfTable;
  if (norm.batch * norm.pixels * norm.channels == 0) {
    if (out.table == nullptr) *out.scale = dynamic_scale(0.0f);
    return QuantizeStatus::kOk;
  }
  const Cut cut(norm);
  Moments moments(norm.batch * cut.parts, cut.columns);
  parallel_for(norm.batch * cut.parts, threads, [&](int64_t task, int64_t) {
    measure_part(kernels, norm, cut, task, moments.of_part(task));
  });
  Affines affines(norm.batch, cut.columns);
  set_affines(norm, cut, moments, affines);
  const uint32_t bits = largest_at_extremes(kernels, norm, cut, moments, affines, false);
  if (bits >= kActivationInfinity) return QuantizeStatus::kNonFinite;
  if (out.table == nullptr) {
    *out.scale = dynamic_scale(
        norm.is_silu ? silu_absmax(kernels, norm, cut, moments, affines, threads) : as_float(bits));
  }
  const float inverse_scale = 1.0f / *out.scale;
  for_each_row(norm, cut, affines, threads,
               [&](const AffineRow& row, int64_t numbers, int64_t pixel) {
                 kernels.affine_quantize(row, numbers, norm.is_silu, inverse_scale,
                                         out.x_q + pixel * norm.channels);
               });
  return QuantizeStatus::kOk;
}

}  // namespace ptq4adm
