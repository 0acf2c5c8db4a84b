// Portable inner loops: what every other instruction set must equal.

#include "epilogue.h"
#include "kernels.h"

namespace ptq4adm {
namespace {

int8_t activation(const int8_t* row, int64_t channel, int64_t channels) {
  return row != nullptr && channel < channels ? row[channel] : int8_t{0};
}

void pack_u8(const int8_t* const rows[kRows], int64_t channels, int64_t channels_padded,
             uint8_t* x) {
  for (int64_t c = 0; c < channels_padded; c += 4) {
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t i = 0; i < 4; ++i) {
        *x++ = static_cast<uint8_t>(activation(rows[r], c + i, channels) + kActivationOffset);
      }
    }
  }
}

void pack_s16(const int8_t* const rows[kRows], int64_t channels, int64_t channels_padded,
              int16_t* x) {
  for (int64_t c = 0; c < channels_padded; c += 2) {
    for (int64_t r = 0; r < kRows; ++r) {
      *x++ = activation(rows[r], c, channels);
      *x++ = activation(rows[r], c + 1, channels);
    }
  }
}

void unpack_w4(const uint8_t* packed, const int16_t* mult, int64_t k, int8_t* panel,
               int32_t* weight_sum) {
  for (int64_t k0 = 0; k0 < k; k0 += 4, packed += 32, panel += 64) {
    const int16_t* block_mult = mult + k0 / kBlockK * 2 * kPanel;
    for (int64_t i = 0; i < 32; ++i) {
      const int64_t channel = i / 4;
      panel[i] = static_cast<int8_t>((packed[i] & 0x0F) - 8);
      panel[i + 32] = static_cast<int8_t>((packed[i] >> 4) - 8);
      weight_sum[channel] += panel[i] * block_mult[2 * channel];
      weight_sum[channel + 8] += panel[i + 32] * block_mult[2 * (channel + 8)];
    }
  }
}

void wrapping_add(int32_t& acc, int32_t term) {
  acc = static_cast<int32_t>(static_cast<uint32_t>(acc) + static_cast<uint32_t>(term));
}

void tile_w4(const uint8_t* x, const int8_t* panel, const int16_t* mult, int64_t k, int32_t* acc) {
  for (int64_t k0 = 0; k0 < k; k0 += 4, x += 4 * kRows, panel += 4 * kPanel) {
    const int16_t* block_mult = mult + k0 / kBlockK * 2 * kPanel;
    for (int64_t r = 0; r < kRows; ++r) {
      const uint8_t* row = x + 4 * r;
      for (int64_t n = 0; n < kPanel; ++n) {
        const int8_t* w = panel + 4 * n;
        const int32_t sum = row[0] * w[0] + row[1] * w[1] + row[2] * w[2] + row[3] * w[3];
        wrapping_add(acc[r * kPanel + n], sum * block_mult[2 * n]);
      }
    }
  }
}

void tile_w8(const int16_t* x, const int8_t* packed, int64_t k, int32_t* acc) {
  for (int64_t k0 = 0; k0 < k; k0 += 2, x += 2 * kRows, packed += 2 * kPanel) {
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t n = 0; n < kPanel; ++n) {
        wrapping_add(acc[r * kPanel + n],
                     x[2 * r] * packed[2 * n] + x[2 * r + 1] * packed[2 * n + 1]);
      }
    }
  }
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels kernels{"scalar", pack_u8,       pack_s16,     unpack_w4,      tile_w4,
                               tile_w8,  finish_scalar, absmax_bits_scalar, quantize_scalar};
  return kernels;
}

}  // namespace ptq4adm
