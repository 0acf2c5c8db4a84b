// The inner loops of the cpu backend, one table of functions per instruction set.
//
// Data the functions share (kRows = 4 activation rows, kPanel = 16 output channels):
//   x, W4    uint8 [k / 4][4 rows][4 k]    activation + 128, so that it is unsigned for vpmaddubsw
//   x, W8    int16 [k / 2][4 rows][2 k]    activation, widened for vpmaddwd
//   packed   the cpu weight order of ptq4adm/ops/prepack.py
//   panel    int8  [k / 4][16 channels][4 k]    W4 weights decoded once per row block
//   mult     int16 [k / 64][16 channels][2]     group multipliers, each twice; 1 without groups
//   acc      int32 [rows][16]
// Accumulators may wrap on the way (W4 adds 128 * sum(w) that the driver takes off again): the
// arithmetic is modulo 2^32 and the true sum fits, so the result is exact.
#pragma once

#include <cstdint>

namespace ptq4adm {

constexpr int64_t kRows = 4;
constexpr int64_t kPanel = 16;
constexpr int64_t kBlockK = 64;        // ptq4adm/packing/layout.py: BLOCK_K
constexpr int64_t kChunkK = 512;       // decoded at a time: 8 KiB of panel stay in L1
constexpr int32_t kActivationOffset = 128;
constexpr int32_t kInt8Max = 127;
constexpr uint32_t kInfinityBits = 0x7f800000u;  // |x| >= this, as bits: infinity or NaN

// Rows and columns of one output tile, pointing at its first element.
struct TileEpilogue {
  const int32_t* acc;       // [rows][16]
  const int32_t* acc2;      // second K segment, or null
  const float* x_scale;     // read at row * x_scale_stride (0 or 1)
  const float* x2_scale;
  int64_t x_scale_stride;
  int64_t x2_scale_stride;
  const float* w_scale;     // [columns]
  const float* bias;        // [columns], or null
  const float* temb;        // [B, N] at the tile's first column, or null
  const float* residual;    // [M, N] at the tile's first element, or null
  int64_t first_row;        // m of the tile's first row
  int64_t rows_per_temb;    // M / B
  int64_t stride;           // N: row stride of temb and residual
  int64_t rows;
  int64_t columns;          // 1..16
};

struct Kernels {
  const char* name;

  // Packs four rows of one tap. A null row reads as zeros, as do channels from `channels` up to
  // `channels_padded`.
  void (*pack_u8)(const int8_t* const rows[kRows], int64_t channels, int64_t channels_padded,
                  uint8_t* x);
  void (*pack_s16)(const int8_t* const rows[kRows], int64_t channels, int64_t channels_padded,
                   int16_t* x);

  // Decodes k steps of one packed W4 panel and adds sum_k w * mult to weight_sum[16].
  void (*unpack_w4)(const uint8_t* packed, const int16_t* mult, int64_t k, int8_t* panel,
                    int32_t* weight_sum);

  // acc[4][16] += x * panel over k, a multiple of 64.
  void (*tile_w4)(const uint8_t* x, const int8_t* panel, const int16_t* mult, int64_t k,
                  int32_t* acc);
  void (*tile_w8)(const int16_t* x, const int8_t* packed, int64_t k, int32_t* acc);

  // y = (acc * x_scale [+ acc2 * x2_scale]) * w_scale + bias + temb + residual, in that order and
  // never fused, so that every instruction set and the reference agree bit for bit.
  void (*finish)(const TileEpilogue& tile, float* y, int64_t y_stride);

  // Largest |x| as bits (bit patterns of positive floats order like the floats).
  uint32_t (*absmax_bits)(const float* x, int64_t count);
  // x_q = clamp(rint(x * inverse_scale), -127, 127); returns the largest |x| as bits.
  uint32_t (*quantize)(const float* x, int64_t count, float inverse_scale, int8_t* x_q);
};

const Kernels& scalar_kernels();
const Kernels* avx2_kernels();  // null where the file was not compiled for AVX2

// The kernels for "auto", "avx2" or "scalar". Throws std::invalid_argument for another name and
// std::runtime_error for an instruction set that this processor or this build lacks.
const Kernels& select_kernels(const char* isa);

}  // namespace ptq4adm
