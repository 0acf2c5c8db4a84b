// AVX2 inner loops. The only file compiled with -mavx2; it includes no standard-library templates.
//
// W4: the weight enters as w + 8 in 0..15, so one vpmaddubsw gives pair sums of at most
// 2 * 15 * 128 = 3840 and eight of them (32 k) add up exactly in int16 (30720 < 32768) before one
// vpmaddwd by ones widens to int32. In group mode the sum of the activations would need a
// multiplier a channel, so there the activation is the unsigned side, x + 128, with the weight in
// -8..7: eight steps reach 2 * 255 * 8 * 8 = 32640, and vpmaddwd multiplies by the group's
// multiplier. W8: a pair sum of u8 and s8 would saturate, so w + 128 is split into two nibbles with
// a chain each.

#include "epilogue.h"
#include "kernels.h"

#if defined(__AVX2__)

#include <immintrin.h>

namespace ptq4adm {
namespace {

constexpr int64_t kRows = 4;  // 8 chains, 2 weights, 1 broadcast: 6 rows spill

// gcc otherwise hoists broadcasts out of the row loop and spills: 150 against 240 GOPS
#define PTQ4ADM_KEEP_IN_REGISTERS(a, b) asm volatile("" : "+x"(a), "+x"(b))

__m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

__m256i broadcast32(const void* p) {
  int32_t value = 0;
  std::memcpy(&value, p, sizeof value);
  return _mm256_set1_epi32(value);
}

// --- W4: chains of int16
// --------------------------------------------------------------------------

void accumulate(int32_t* acc, __m256i term) { store256(acc, _mm256_add_epi32(load256(acc), term)); }

void decode_w4(const DecodeCall& call) {
  const __m256i low_nibble = _mm256_set1_epi8(0x0F);
  const uint8_t* packed = call.packed;
  uint8_t* panel = call.panel;
  for (int64_t step = 0; step < call.k / kStepK; ++step, packed += 32, panel += 64) {
    const __m256i bytes = load256(packed);
    store256(panel, _mm256_and_si256(bytes, low_nibble));
    store256(panel + 32, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_nibble));
  }
}

// Signed, with -128 * sum(w * mult) of every channel.
void decode_w4_groups(const DecodeCall& call) {
  const __m256i low_nibble = _mm256_set1_epi8(0x0F);
  const __m256i eight = _mm256_set1_epi8(8), one = _mm256_set1_epi8(1);
  const uint8_t* packed = call.packed;
  uint8_t* panel = call.panel;
  const int16_t* mult = call.mult;
  __m256i start0 = _mm256_setzero_si256(), start1 = _mm256_setzero_si256();
  for (int64_t k0 = 0; k0 < call.k; k0 += kBlockK, mult += 2 * kPanel) {
    __m256i sum0 = _mm256_setzero_si256(), sum1 = _mm256_setzero_si256();  // 16 steps * 16 < 32768
    for (int64_t step = 0; step < kBlockK / kStepK; ++step, packed += 32, panel += 64) {
      const __m256i bytes = load256(packed);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_nibble);
      const __m256i w0 = _mm256_sub_epi8(_mm256_and_si256(bytes, low_nibble), eight);
      const __m256i w1 = _mm256_sub_epi8(high, eight);
      store256(panel, w0);
      store256(panel + 32, w1);
      sum0 = _mm256_add_epi16(sum0, _mm256_maddubs_epi16(one, w0));
      sum1 = _mm256_add_epi16(sum1, _mm256_maddubs_epi16(one, w1));
    }
    start0 = _mm256_sub_epi32(start0, _mm256_madd_epi16(sum0, load256(mult)));
    start1 = _mm256_sub_epi32(start1, _mm256_madd_epi16(sum1, load256(mult + kPanel)));
  }
  store256(call.channel_start, _mm256_slli_epi32(start0, 7));
  store256(call.channel_start + 8, _mm256_slli_epi32(start1, 7));
}

void start_accumulators(const TileCall& call) {
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t n = 0; n < kPanel; n += 8) {
      __m256i acc = call.row_start != nullptr ? _mm256_set1_epi32(call.row_start[r])
                                              : load256(call.acc + r * kPanel + n);
      if (call.channel_start != nullptr) {
        acc = _mm256_add_epi32(acc, load256(call.channel_start + n));
      }
      store256(call.acc + r * kPanel + n, acc);
    }
  }
}

// Up to eight steps, whose sums stay exact in int16, then one widening by the multiplier.
template <bool kIsActivationOffset>
inline __attribute__((always_inline)) void chain(const int8_t* const (&x)[kRows],
                                                 const uint8_t* panel, int64_t steps, __m256i mult0,
                                                 __m256i mult1, int32_t* acc) {
  __m256i sum[kRows][2];
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int64_t step = 0; step < steps; ++step) {
    const __m256i w0 = load256(panel + 64 * step), w1 = load256(panel + 64 * step + 32);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const __m256i row = broadcast32(x[r] + kStepK * step);
      const __m256i product0 =
          kIsActivationOffset ? _mm256_maddubs_epi16(row, w0) : _mm256_maddubs_epi16(w0, row);
      const __m256i product1 =
          kIsActivationOffset ? _mm256_maddubs_epi16(row, w1) : _mm256_maddubs_epi16(w1, row);
      sum[r][0] = _mm256_add_epi16(sum[r][0], product0);
      sum[r][1] = _mm256_add_epi16(sum[r][1], product1);
      PTQ4ADM_KEEP_IN_REGISTERS(sum[r][0], sum[r][1]);
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRows; ++r) {
    accumulate(acc + r * kPanel, _mm256_madd_epi16(sum[r][0], mult0));
    accumulate(acc + r * kPanel + 8, _mm256_madd_epi16(sum[r][1], mult1));
  }
}

// The rows of one tap.
struct TapRows {
  const int8_t* x[kRows];

  TapRows(const TileCall& call, const Run& run) {
    for (int64_t r = 0; r < kRows; ++r) x[r] = call.rows[run.tap * kRows + r] + run.channel;
  }
  void advance(int64_t channels) {
    for (int64_t r = 0; r < kRows; ++r) x[r] += channels;
  }
};

constexpr int64_t kExactSteps = 8;

void tile_w4(const TileCall& call) {
  start_accumulators(call);
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t* panel = call.panel;
  for (int64_t i = 0; i < call.run_count; ++i) {
    const Run& run = call.runs[i];
    TapRows rows(call, run);
    int64_t step = 0;
    for (; step + kExactSteps <= run.steps; step += kExactSteps) {
      chain<false>(rows.x, panel + 64 * step, kExactSteps, ones, ones, call.acc);
      rows.advance(kStepK * kExactSteps);
    }
    if (step < run.steps) {
      chain<false>(rows.x, panel + 64 * step, run.steps - step, ones, ones, call.acc);
    }
    panel += 64 * run.panel_steps;
  }
}

void tile_w4_groups(const TileCall& call) {
  constexpr int64_t kBlockSteps = kBlockK / kStepK;
  start_accumulators(call);
  const uint8_t* panel = call.panel;
  const int16_t* mult = call.mult;
  for (int64_t i = 0; i < call.run_count; ++i) {
    const Run& run = call.runs[i];
    TapRows rows(call, run);
    for (int64_t step = 0; step < run.steps; step += kExactSteps) {
      const int16_t* group = mult + step / kBlockSteps * 2 * kPanel;
      const __m256i mult0 = load256(group), mult1 = load256(group + kPanel);
      const int64_t steps = run.steps - step < kExactSteps ? run.steps - step : kExactSteps;
      if (steps == kExactSteps) {
        chain<true>(rows.x, panel + 64 * step, kExactSteps, mult0, mult1, call.acc);
      } else {
        chain<true>(rows.x, panel + 64 * step, steps, mult0, mult1, call.acc);
      }
      rows.advance(kStepK * kExactSteps);
    }
    panel += 64 * run.panel_steps;
    mult += run.panel_steps / kBlockSteps * 2 * kPanel;
  }
}

// --- W8: two chains, one for each nibble of w + 128
// ------------------------------------------------

// High nibbles of the whole chunk, then the low ones.
void decode_w8(const DecodeCall& call) {
  const __m256i low_nibble = _mm256_set1_epi8(0x0F), offset = _mm256_set1_epi8(-128);
  for (int64_t byte = 0; byte < call.k * kPanel; byte += 32) {
    const __m256i w = _mm256_xor_si256(load256(call.packed + byte), offset);
    store256(call.panel + byte, _mm256_and_si256(_mm256_srli_epi16(w, 4), low_nibble));
    store256(call.panel + call.k * kPanel + byte, _mm256_and_si256(w, low_nibble));
  }
}

// w + 128 = 16 * high + low: the multiplier of a chain is 16 or 1.
void tile_w8(const TileCall& call) {
  start_accumulators(call);
  const uint8_t* panel = call.panel;
  for (int16_t weight = 16; weight >= 1; weight = static_cast<int16_t>(weight / 16)) {
    const __m256i mult = _mm256_set1_epi16(weight);
    for (int64_t i = 0; i < call.run_count; ++i) {
      const Run& run = call.runs[i];
      TapRows rows(call, run);
      for (int64_t step = 0; step < run.steps; step += kExactSteps) {
        if (run.steps - step >= kExactSteps) {
          chain<false>(rows.x, panel + 64 * step, kExactSteps, mult, mult, call.acc);
        } else {
          chain<false>(rows.x, panel + 64 * step, run.steps - step, mult, mult, call.acc);
        }
        rows.advance(kStepK * kExactSteps);
      }
      panel += 64 * run.panel_steps;
    }
  }
}

int32_t sum_row(const int8_t* row, int64_t channels) {
  const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
  __m256i sum = _mm256_setzero_si256();
  int64_t c = 0;
  for (; c + 32 <= channels; c += 32) {
    sum = _mm256_add_epi32(
        sum, _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, load256(row + c)), ones16));
  }
  alignas(32) int32_t lanes[8];
  store256(lanes, sum);
  int32_t total = 0;
  for (int32_t lane : lanes) total += lane;
  for (; c < channels; ++c) total += row[c];
  return total;
}

// --- float parts
// ----------------------------------------------------------------------------------

__m256 scaled(const int32_t* acc, __m256 scale) {
  return _mm256_mul_ps(_mm256_cvtepi32_ps(load256(acc)), scale);
}

void finish(const TileEpilogue& tile, float* y, int64_t y_stride) {
  if (tile.columns < kPanel) {
    finish_scalar(tile, y, y_stride);
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const __m256 x_scale = _mm256_set1_ps(tile.x_scale[r * tile.x_scale_stride]);
    const int64_t sample = tile.temb != nullptr ? (tile.first_row + r) / tile.rows_per_temb : 0;
    for (int64_t n = 0; n < kPanel; n += 8) {
      __m256 value = scaled(tile.acc + r * tile.acc_stride + n, x_scale);
      if (tile.acc2 != nullptr) {
        const __m256 x2_scale = _mm256_set1_ps(tile.x2_scale[r * tile.x2_scale_stride]);
        value = _mm256_add_ps(value, scaled(tile.acc2 + r * tile.acc_stride + n, x2_scale));
      }
      value = _mm256_mul_ps(value, _mm256_loadu_ps(tile.w_scale + n));
      if (tile.bias != nullptr) value = _mm256_add_ps(value, _mm256_loadu_ps(tile.bias + n));
      if (tile.temb != nullptr) {
        value = _mm256_add_ps(value, _mm256_loadu_ps(tile.temb + sample * tile.stride + n));
      }
      if (tile.residual != nullptr) {
        value = _mm256_add_ps(value, _mm256_loadu_ps(tile.residual + r * tile.stride + n));
      }
      _mm256_storeu_ps(y + r * y_stride + n, value);
    }
  }
}

}  // namespace

const Kernels* avx2_kernels() {
  // 512 k x 16 channels: 8 KiB of panel (16 for W8) stay in L1
  static const Kernels kernels{"avx2",
                               kRows,
                               1,
                               512,
                               2,
                               {8, false, decode_w4, tile_w4},
                               {0, true, decode_w4_groups, tile_w4_groups},
                               {128, false, decode_w8, tile_w8},
                               sum_row,
                               finish};
  return &kernels;
}

}  // namespace ptq4adm

#else

namespace ptq4adm {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace ptq4adm

#endif
