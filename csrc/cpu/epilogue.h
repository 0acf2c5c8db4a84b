// Portable epilogue. Everything here has internal linkage: each instruction set's file compiles
// its own copy, so the linker can never put AVX2 code where the portable kernels call it.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace ptq4adm {
namespace {

[[maybe_unused]] void finish_scalar(const TileEpilogue& tile, float* y, int64_t y_stride) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float x_scale = tile.x_scale[r * tile.x_scale_stride];
    const float x2_scale = tile.acc2 != nullptr ? tile.x2_scale[r * tile.x2_scale_stride] : 0.0f;
    const int64_t sample = tile.temb != nullptr ? (tile.first_row + r) / tile.rows_per_temb : 0;
    for (int64_t n = 0; n < tile.columns; ++n) {
      float value = static_cast<float>(tile.acc[r * tile.acc_stride + n]) * x_scale;
      if (tile.acc2 != nullptr) {
        value += static_cast<float>(tile.acc2[r * tile.acc_stride + n]) * x2_scale;
      }
      value *= tile.w_scale[n];
      if (tile.bias != nullptr) value += tile.bias[n];
      if (tile.temb != nullptr) value += tile.temb[sample * tile.stride + n];
      if (tile.residual != nullptr) value += tile.residual[r * tile.stride + n];
      y[r * y_stride + n] = value;
    }
  }
}

}  // namespace
}  // namespace ptq4adm
