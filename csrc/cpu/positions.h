// Which pixels the rows of a convolution read.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace ptq4adm {

// An output position. Stepping to the next one needs no division.
struct Position {
  int64_t sample, row, column;

  Position(const Conv2dShape& shape, int64_t m) {
    const int64_t line = m / shape.out_size[1];
    sample = line / shape.out_size[0];
    row = line % shape.out_size[0];
    column = m % shape.out_size[1];
  }

  void advance(const Conv2dShape& shape) {
    if (++column < shape.out_size[1]) return;
    column = 0;
    if (++row < shape.out_size[0]) return;
    row = 0;
    ++sample;
  }
};

// Calls visit(tap, pixel in memory, or -1 in the zero padding) for every kernel tap.
template <typename Visit>
void for_each_tap(const Conv2dShape& shape, const Position& at, const Visit& visit) {
  const int64_t top = at.row * shape.stride[0] - shape.padding[0];
  const int64_t left = at.column * shape.stride[1] - shape.padding[1];
  int64_t tap = 0;
  for (int64_t i = 0; i < shape.kernel_size[0]; ++i) {
    const int64_t row = top + i * shape.dilation[0];
    const bool is_inside = row >= 0 && row < shape.upsample[0];
    const int64_t line =
        is_inside ? (at.sample * shape.height + shape.source_row[row]) * shape.width : 0;
    for (int64_t j = 0; j < shape.kernel_size[1]; ++j, ++tap) {
      const int64_t column = left + j * shape.dilation[1];
      const bool is_real = is_inside && column >= 0 && column < shape.upsample[1];
      visit(tap, is_real ? line + shape.source_column[column] : int64_t{-1});
    }
  }
}

}  // namespace ptq4adm
