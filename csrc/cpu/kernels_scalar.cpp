// Portable inner loops: what every other instruction set must equal.

#include "epilogue.h"
#include "kernels.h"

namespace ptq4adm {
namespace {

constexpr int64_t kRows = 4;

int32_t multiplier(const DecodeCall& call, int64_t k, int64_t channel) {
  return call.mult == nullptr ? 1 : call.mult[(k / kBlockK * kPanel + channel) * 2];
}

// The panel is signed: |w * mult| <= 120.
void decode_w4(const DecodeCall& call) {
  int8_t* panel = reinterpret_cast<int8_t*>(call.panel);
  const uint8_t* packed = call.packed;
  for (int64_t k = 0; k < call.k; k += kStepK, packed += 32, panel += kStepK * kPanel) {
    for (int64_t i = 0; i < 32; ++i) {
      const int32_t low = (packed[i] & 0x0F) - 8, high = (packed[i] >> 4) - 8;
      panel[i] = static_cast<int8_t>(low * multiplier(call, k, i / 4));
      panel[i + 32] = static_cast<int8_t>(high * multiplier(call, k, 8 + i / 4));
    }
  }
}

void decode_w8(const DecodeCall& call) {
  std::memcpy(call.panel, call.packed, static_cast<size_t>(call.k * kPanel));
}

void wrapping_add(int32_t& acc, int32_t term) {
  acc = static_cast<int32_t>(static_cast<uint32_t>(acc) + static_cast<uint32_t>(term));
}

void tile(const TileCall& call) {
  if (call.row_start != nullptr) {
    for (int64_t i = 0; i < kRows * kPanel; ++i) call.acc[i] = call.row_start[i / kPanel];
  }
  const int8_t* panel = reinterpret_cast<const int8_t*>(call.panel);
  for (int64_t i = 0; i < call.run_count; ++i) {
    const Run& run = call.runs[i];
    for (int64_t step = 0; step < run.steps; ++step) {
      for (int64_t r = 0; r < kRows; ++r) {
        const int8_t* x = call.rows[run.tap * kRows + r] + run.channel + step * kStepK;
        for (int64_t n = 0; n < kPanel; ++n) {
          const int8_t* w = panel + (step * kPanel + n) * kStepK;
          wrapping_add(call.acc[r * kPanel + n],
                       x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3]);
        }
      }
    }
    panel += run.panel_steps * kPanel * kStepK;
  }
}

int32_t sum_row(const int8_t* row, int64_t channels) {
  int32_t sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += row[c];
  return sum;
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels kernels{"scalar",
                               kRows,
                               1,
                               512,
                               1,
                               {0, false, decode_w4, tile},
                               {0, false, decode_w4, tile},
                               {0, false, decode_w8, tile},
                               sum_row,
                               finish_scalar};
  return kernels;
}

}  // namespace ptq4adm
