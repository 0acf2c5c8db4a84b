// AVX2 inner loops. The only file compiled with -mavx2; it includes no standard-library templates.
//
// W4: one vpmaddubsw gives 16 pair sums of at most 2 * 255 * 8 = 4080, so eight of them (32 k) add
// up exactly in int16 (32640 < 32768) before one vpmaddwd by the group multiplier widens to int32.
// W8: vpmaddubsw would saturate, so both sides are widened and vpmaddwd sums pairs in int32.

#include "epilogue.h"
#include "kernels.h"

#if defined(__AVX2__)

#include <immintrin.h>

namespace ptq4adm {
namespace {

// gcc otherwise hoists broadcasts out of the row loop and spills: 150 against 240 GOPS
#define PTQ4ADM_KEEP_IN_REGISTERS(a, b) asm volatile("" : "+x"(a), "+x"(b))

__m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
__m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
void store128(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }

__m256i broadcast32(const void* p) {
  int32_t value = 0;
  std::memcpy(&value, p, sizeof value);
  return _mm256_set1_epi32(value);
}

// --- packing of activations --------------------------------------------------------------------

// Writes the four 32-bit columns of four rows one after the other: a 4 x 4 transpose.
void store_transposed(__m128i row0, __m128i row1, __m128i row2, __m128i row3, void* out) {
  const __m128i low01 = _mm_unpacklo_epi32(row0, row1), high01 = _mm_unpackhi_epi32(row0, row1);
  const __m128i low23 = _mm_unpacklo_epi32(row2, row3), high23 = _mm_unpackhi_epi32(row2, row3);
  char* bytes = static_cast<char*>(out);
  store128(bytes, _mm_unpacklo_epi64(low01, low23));
  store128(bytes + 16, _mm_unpackhi_epi64(low01, low23));
  store128(bytes + 32, _mm_unpacklo_epi64(high01, high23));
  store128(bytes + 48, _mm_unpackhi_epi64(high01, high23));
}

// Reads 16 channels of each row; a null row stays on 16 zero bytes (advance 0).
struct RowReader {
  alignas(16) int8_t zeros[16] = {};
  const int8_t* base[kRows];
  int64_t advance[kRows];

  explicit RowReader(const int8_t* const rows[kRows]) {
    for (int64_t r = 0; r < kRows; ++r) {
      base[r] = rows[r] != nullptr ? rows[r] : zeros;
      advance[r] = rows[r] != nullptr ? 1 : 0;
    }
  }

  __m128i full(int64_t r, int64_t c) const { return load128(base[r] + c * advance[r]); }

  __m128i partial(int64_t r, int64_t c, int64_t count) const {
    alignas(16) int8_t bytes[16] = {};
    if (count > 0) std::memcpy(bytes, base[r] + c * advance[r], static_cast<size_t>(count));
    return load128(bytes);
  }
};

struct StoreU8 {
  uint8_t* x;
  void operator()(const __m128i row[kRows], int64_t c) const {
    const __m128i offset = _mm_set1_epi8(static_cast<char>(kActivationOffset));
    store_transposed(_mm_xor_si128(row[0], offset), _mm_xor_si128(row[1], offset),
                     _mm_xor_si128(row[2], offset), _mm_xor_si128(row[3], offset), x + c * kRows);
  }
};

struct StoreS16 {
  int16_t* x;
  void operator()(const __m128i row[kRows], int64_t c) const {
    __m256i wide[kRows];
    for (int64_t r = 0; r < kRows; ++r) wide[r] = _mm256_cvtepi8_epi16(row[r]);
    int16_t* out = x + c * kRows;
    store_transposed(_mm256_castsi256_si128(wide[0]), _mm256_castsi256_si128(wide[1]),
                     _mm256_castsi256_si128(wide[2]), _mm256_castsi256_si128(wide[3]), out);
    store_transposed(_mm256_extracti128_si256(wide[0], 1), _mm256_extracti128_si256(wide[1], 1),
                     _mm256_extracti128_si256(wide[2], 1), _mm256_extracti128_si256(wide[3], 1),
                     out + 8 * kRows);
  }
};

template <typename Store>
void pack(const int8_t* const rows[kRows], int64_t channels, int64_t channels_padded,
          const Store& store) {
  const RowReader reader(rows);
  __m128i row[kRows];
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) {
    for (int64_t r = 0; r < kRows; ++r) row[r] = reader.full(r, c);
    store(row, c);
  }
  for (; c < channels_padded; c += 16) {
    for (int64_t r = 0; r < kRows; ++r) row[r] = reader.partial(r, c, channels - c);
    store(row, c);
  }
}

void pack_u8(const int8_t* const rows[kRows], int64_t channels, int64_t channels_padded,
             uint8_t* x) {
  pack(rows, channels, channels_padded, StoreU8{x});
}

void pack_s16(const int8_t* const rows[kRows], int64_t channels, int64_t channels_padded,
              int16_t* x) {
  pack(rows, channels, channels_padded, StoreS16{x});
}

// --- W4 -----------------------------------------------------------------------------------------

void accumulate(int32_t* acc, __m256i term) { store256(acc, _mm256_add_epi32(load256(acc), term)); }

void unpack_w4(const uint8_t* packed, const int16_t* mult, int64_t k, int8_t* panel,
               int32_t* weight_sum) {
  const __m256i low_nibble = _mm256_set1_epi8(0x0F);
  const __m256i eight = _mm256_set1_epi8(8);
  const __m256i one = _mm256_set1_epi8(1);
  for (int64_t k0 = 0; k0 < k; k0 += kBlockK, mult += 2 * kPanel) {
    __m256i sum0 = _mm256_setzero_si256(), sum1 = _mm256_setzero_si256();  // 16 steps * 16 < 32768
    for (int64_t step = 0; step < kBlockK / 4; ++step, packed += 32, panel += 64) {
      const __m256i bytes = load256(packed);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_nibble);
      const __m256i w0 = _mm256_sub_epi8(_mm256_and_si256(bytes, low_nibble), eight);
      const __m256i w1 = _mm256_sub_epi8(high, eight);
      store256(panel, w0);
      store256(panel + 32, w1);
      sum0 = _mm256_add_epi16(sum0, _mm256_maddubs_epi16(one, w0));
      sum1 = _mm256_add_epi16(sum1, _mm256_maddubs_epi16(one, w1));
    }
    accumulate(weight_sum, _mm256_madd_epi16(sum0, load256(mult)));
    accumulate(weight_sum + 8, _mm256_madd_epi16(sum1, load256(mult + kPanel)));
  }
}

void tile_w4(const uint8_t* x, const int8_t* panel, const int16_t* mult, int64_t k, int32_t* acc) {
  constexpr int64_t kExactSteps = 8;  // vpmaddubsw results that add up exactly in int16
  for (int64_t k0 = 0; k0 < k; k0 += 4 * kExactSteps) {
    __m256i sum[kRows][2];
    for (int64_t r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int64_t step = 0; step < kExactSteps; ++step, x += 4 * kRows, panel += 4 * kPanel) {
      const __m256i w0 = load256(panel), w1 = load256(panel + 32);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        const __m256i row = broadcast32(x + 4 * r);
        sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(row, w0));
        sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(row, w1));
        PTQ4ADM_KEEP_IN_REGISTERS(sum[r][0], sum[r][1]);
      }
    }
    const int16_t* block_mult = mult + k0 / kBlockK * 2 * kPanel;
    const __m256i mult0 = load256(block_mult), mult1 = load256(block_mult + kPanel);
    for (int64_t r = 0; r < kRows; ++r) {
      accumulate(acc + r * kPanel, _mm256_madd_epi16(sum[r][0], mult0));
      accumulate(acc + r * kPanel + 8, _mm256_madd_epi16(sum[r][1], mult1));
    }
  }
}

// --- W8 -----------------------------------------------------------------------------------------

void tile_w8(const int16_t* x, const int8_t* packed, int64_t k, int32_t* acc) {
  __m256i sum[kRows][2];
  for (int64_t r = 0; r < kRows; ++r) {
    sum[r][0] = load256(acc + r * kPanel);
    sum[r][1] = load256(acc + r * kPanel + 8);
  }
#pragma GCC unroll 4
  for (int64_t k0 = 0; k0 < k; k0 += 2, x += 2 * kRows, packed += 2 * kPanel) {
    const __m256i w0 = _mm256_cvtepi8_epi16(load128(packed));
    const __m256i w1 = _mm256_cvtepi8_epi16(load128(packed + 16));
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const __m256i row = broadcast32(x + 2 * r);
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(row, w0));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(row, w1));
      PTQ4ADM_KEEP_IN_REGISTERS(sum[r][0], sum[r][1]);
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    store256(acc + r * kPanel, sum[r][0]);
    store256(acc + r * kPanel + 8, sum[r][1]);
  }
}

// --- float parts ----------------------------------------------------------------------------------

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
      __m256 value = scaled(tile.acc + r * kPanel + n, x_scale);
      if (tile.acc2 != nullptr) {
        const __m256 x2_scale = _mm256_set1_ps(tile.x2_scale[r * tile.x2_scale_stride]);
        value = _mm256_add_ps(value, scaled(tile.acc2 + r * kPanel + n, x2_scale));
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

uint32_t largest_lane(__m256i bits) {
  alignas(32) uint32_t lanes[8];
  store256(lanes, bits);
  uint32_t largest = 0;
  for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

__m256i magnitude(__m256 value) {
  return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
}

uint32_t absmax_bits(const float* x, int64_t count) {
  __m256i even = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    even = _mm256_max_epi32(even, magnitude(_mm256_loadu_ps(x + i)));
    odd = _mm256_max_epi32(odd, magnitude(_mm256_loadu_ps(x + i + 8)));
  }
  const uint32_t tail = absmax_bits_scalar(x + i, count - i);
  const uint32_t largest = largest_lane(_mm256_max_epi32(even, odd));
  return tail > largest ? tail : largest;
}

uint32_t quantize(const float* x, int64_t count, float inverse_scale, int8_t* x_q) {
  const __m256 scale = _mm256_set1_ps(inverse_scale);
  const __m256 upper = _mm256_set1_ps(kInt8Max), lower = _mm256_set1_ps(-kInt8Max);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the lanes of vpack
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256i rounded[4];
    for (int64_t j = 0; j < 4; ++j) {
      const __m256 value = _mm256_loadu_ps(x + i + 8 * j);
      largest = _mm256_max_epi32(largest, magnitude(value));
      const __m256 clamped = _mm256_max_ps(_mm256_min_ps(_mm256_mul_ps(value, scale), upper), lower);
      rounded[j] = _mm256_cvtps_epi32(clamped);  // to even, the default rounding mode
    }
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]),
                                             _mm256_packs_epi32(rounded[2], rounded[3]));
    store256(x_q + i, _mm256_permutevar8x32_epi32(bytes, order));
  }
  const uint32_t tail = quantize_scalar(x + i, count - i, inverse_scale, x_q + i);
  const uint32_t lanes = largest_lane(largest);
  return tail > lanes ? tail : lanes;
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels{"avx2",  pack_u8, pack_s16,    unpack_w4, tile_w4,
                               tile_w8, finish,  absmax_bits, quantize};
  return &kernels;
}

}  // namespace ptq4adm

#else

namespace ptq4adm {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace ptq4adm

#endif
