// Decoding and multiplication for processors with vpdpbusd, written over a small set of vector
// operations, so that 512-bit, 256-bit and emulated vectors share one text.
//
// vpdpbusd adds four products of an unsigned and a signed byte to an int32 lane without saturating.
// The weight takes the unsigned side (w + 8, or w + 128 for 8 bits and for groups, whose multiplier
// is applied while decoding), so activations are broadcast from where they lie.
//
// Internal linkage: see epilogue.h. `Simd` gives
//   Vector, kBytes, kRows, kPanels, and the static functions used below.
#pragma once

#include <cstring>

#include "kernels.h"

namespace ptq4adm {
namespace {

template <typename Simd, int64_t kPanels>
struct VnniTile {
  using Vector = typename Simd::Vector;
  static constexpr int64_t kVectors = kPanels * kPanel * 4 / Simd::kBytes;
  static constexpr int64_t kLanes = Simd::kBytes / 4;
  static constexpr int64_t kWidth = kPanels * kPanel;

  static void tile(const TileCall& call) {
    Vector acc[Simd::kRows][kVectors];
#pragma GCC unroll 8
    for (int64_t r = 0; r < Simd::kRows; ++r) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v) {
        acc[r][v] = call.row_start != nullptr ? Simd::splat32(call.row_start[r])
                                              : Simd::load(call.acc + r * kWidth + v * kLanes);
      }
    }
    const uint8_t* panel = call.panel;
    for (int64_t i = 0; i < call.run_count; ++i) {
      const Run& run = call.runs[i];
      const int8_t* x[Simd::kRows];
#pragma GCC unroll 8
      for (int64_t r = 0; r < Simd::kRows; ++r) {
        x[r] = call.rows[run.tap * Simd::kRows + r] + run.channel;
      }
      multiply(x, panel, run.steps, acc);
      panel += run.panel_steps * kStepK * kWidth;
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < Simd::kRows; ++r) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v) {
        Simd::store(call.acc + r * kWidth + v * kLanes, acc[r][v]);
      }
    }
  }

  static inline __attribute__((always_inline)) void multiply(const int8_t* const (&x)[Simd::kRows],
                                                             const uint8_t* panel, int64_t steps,
                                                             Vector (&acc)[Simd::kRows][kVectors]) {
    for (int64_t k = 0; k < steps * kStepK; k += kStepK, panel += kStepK * kWidth) {
      Vector w[kVectors];
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v) w[v] = Simd::load(panel + v * Simd::kBytes);
#pragma GCC unroll 8
      for (int64_t r = 0; r < Simd::kRows; ++r) {
        const Vector row = Simd::broadcast32(x[r] + k);
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v) {
          acc[r][v] = Simd::dot(acc[r][v], w[v], row);
          Simd::keep_in_register(acc[r][v]);
        }
      }
    }
  }
};

template <typename Simd>
void vnni_tile(const TileCall& call) {
  if constexpr (Simd::kPanels >= 4) {
    if (call.panels == 4) return VnniTile<Simd, 4>::tile(call);
    if (call.panels == 3) return VnniTile<Simd, 3>::tile(call);
    if (call.panels == 2) return VnniTile<Simd, 2>::tile(call);
  }
  VnniTile<Simd, 1>::tile(call);
}

// Goes through the chunk in the order of its panel: step(panel of 16, k step, where it is written).
template <typename Step>
inline __attribute__((always_inline)) void for_each_step(const DecodeCall& call, const Step& step) {
  for (int64_t p = 0; p < call.panels; ++p) {
    uint8_t* out = call.panel + p * kPanel * kStepK;
    for (int64_t s = 0; s < call.k / kStepK; ++s, out += call.panels * kPanel * kStepK) {
      step(p, s, out);
    }
  }
}

template <typename Simd>
void vnni_decode_w4(const DecodeCall& call) {
  for_each_step(call, [&](int64_t p, int64_t s, uint8_t* out) {
    Simd::store_nibbles(call.packed + p * call.packed_stride + s * 32, out);
  });
}

// w * mult + 128 = nibble * mult + (128 - 8 * mult), byte by byte and modulo 256: the result lies
// in 8 .. 248, and a product of two nibbles in 16-bit lanes never reaches the neighbouring byte.
template <typename Simd>
void vnni_decode_w4_groups(const DecodeCall& call) {
  constexpr int64_t kStepsPerBlock = kBlockK / kStepK;
  for_each_step(call, [&](int64_t p, int64_t s, uint8_t* out) {
    const int16_t* mult = call.mult + (s / kStepsPerBlock * call.panels + p) * 2 * kPanel;
    Simd::store_nibbles(call.packed + p * call.packed_stride + s * 32, out);
    for (int64_t byte = 0; byte < kPanel * kStepK; byte += Simd::kBytes) {
      const typename Simd::Vector m = Simd::load(mult + byte / 2);
      Simd::store(out + byte, Simd::scale_nibbles(Simd::load(out + byte), m));
    }
  });
}

template <typename Simd>
void vnni_decode_w8(const DecodeCall& call) {
  for_each_step(call, [&](int64_t p, int64_t s, uint8_t* out) {
    const uint8_t* packed = call.packed + p * call.packed_stride + s * kPanel * kStepK;
    for (int64_t byte = 0; byte < kPanel * kStepK; byte += Simd::kBytes) {
      Simd::store(out + byte, Simd::flip_sign_bits(Simd::load(packed + byte)));
    }
  });
}

template <typename Simd>
int32_t vnni_sum_row(const int8_t* row, int64_t channels) {
  typename Simd::Vector sum = Simd::splat32(0);
  const typename Simd::Vector ones = Simd::splat8(1);
  int64_t c = 0;
  for (; c + Simd::kBytes <= channels; c += Simd::kBytes) {
    sum = Simd::dot(sum, ones, Simd::load(row + c));
  }
  int32_t total = Simd::sum32(sum);
  for (; c < channels; ++c) total += row[c];
  return total;
}

// Chunks of 1024 k: 64 KiB of panel with 64 channels stream out of L2, 16 KiB with 16 stay in L1.
template <typename Simd>
Kernels vnni_kernels(const char* name, void (*finish)(const TileEpilogue&, float*, int64_t)) {
  const auto format = [](int32_t weight_offset, void (*decode)(const DecodeCall&)) {
    return Format{weight_offset, false, decode, vnni_tile<Simd>};
  };
  Kernels kernels{};
  kernels.name = name;
  kernels.rows = Simd::kRows;
  kernels.panels = Simd::kPanels;
  kernels.chunk_k = 1024;
  kernels.panel_copies = 1;
  kernels.w4 = format(8, vnni_decode_w4<Simd>);
  kernels.w4_groups = format(128, vnni_decode_w4_groups<Simd>);
  kernels.w8 = format(128, vnni_decode_w8<Simd>);
  kernels.sum_row = vnni_sum_row<Simd>;
  kernels.finish = finish;
  return kernels;
}

}  // namespace
}  // namespace ptq4adm
