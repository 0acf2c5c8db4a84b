// AVX-512 VNNI inner loops: tiles of 6 rows x 64 channels in 24 of the 32 registers.
//
// A step of 4 k is 4 weight loads, 6 broadcasts and 24 vpdpbusd: where two of these run a cycle,
// the loads hide behind them. Compiled with -mavx512vnni; includes no standard-library templates.

#include "epilogue.h"
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__) && defined(__AVX512VNNI__)

#include <immintrin.h>

#include "vnni_tile.h"

namespace ptq4adm {
namespace {

struct Avx512Vnni {
  using Vector = __m512i;
  static constexpr int64_t kBytes = 64;
  static constexpr int64_t kRows = 6;
  static constexpr int64_t kPanels = 4;

  static Vector load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Vector v) { _mm512_storeu_si512(p, v); }
  static Vector splat32(int32_t value) { return _mm512_set1_epi32(value); }
  static Vector splat8(int8_t value) { return _mm512_set1_epi8(value); }
  static Vector broadcast32(const void* p) {
    int32_t value = 0;
    std::memcpy(&value, p, sizeof value);
    return _mm512_set1_epi32(value);
  }
  static Vector dot(Vector acc, Vector u8, Vector s8) { return _mm512_dpbusd_epi32(acc, u8, s8); }
  static void keep_in_register(Vector&) {}  // 32 registers: gcc keeps them by itself
  static int32_t sum32(Vector v) { return _mm512_reduce_add_epi32(v); }
  static Vector flip_sign_bits(Vector v) { return _mm512_xor_si512(v, splat8(-128)); }

  static void store_nibbles(const uint8_t* packed, uint8_t* out) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m512i both =
        _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
    store(out, _mm512_and_si512(both, _mm512_set1_epi8(0x0F)));
  }

  static Vector scale_nibbles(Vector nibbles, Vector mult) {
    const __m512i even =
        _mm512_mullo_epi16(_mm512_and_si512(nibbles, _mm512_set1_epi16(0xFF)), mult);
    const __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(nibbles, 8), mult);
    const __m512i product = _mm512_or_si512(even, _mm512_slli_epi16(odd, 8));
    const __m512i byte_mult = _mm512_or_si512(mult, _mm512_slli_epi16(mult, 8));
    const __m512i eight_fold = _mm512_slli_epi16(byte_mult, 3);  // 8 * 15 = 120 stays in its byte
    return _mm512_add_epi8(product, _mm512_sub_epi8(splat8(-128), eight_fold));
  }
};

// Loads and stores of 16 lanes, or of the first few.
struct AllLanes {
  __m512 load(const float* p) const { return _mm512_loadu_ps(p); }
  __m512i load(const int32_t* p) const { return _mm512_loadu_si512(p); }
  void store(float* p, __m512 v) const { _mm512_storeu_ps(p, v); }
};

struct FirstLanes {
  __mmask16 mask;
  __m512 load(const float* p) const { return _mm512_maskz_loadu_ps(mask, p); }
  __m512i load(const int32_t* p) const { return _mm512_maskz_loadu_epi32(mask, p); }
  void store(float* p, __m512 v) const { _mm512_mask_storeu_ps(p, mask, v); }
};

// What one row of a tile adds and multiplies, as pointers to its first column.
struct RowEpilogue {
  const int32_t *acc, *acc2;
  __m512 x_scale, x2_scale;
  const float *w_scale, *bias, *temb, *residual;
  float* y;

  RowEpilogue(const TileEpilogue& tile, int64_t r, float* y)
      : acc(tile.acc + r * tile.acc_stride),
        acc2(tile.acc2 != nullptr ? tile.acc2 + r * tile.acc_stride : nullptr),
        x_scale(_mm512_set1_ps(tile.x_scale[r * tile.x_scale_stride])),
        x2_scale(_mm512_setzero_ps()),
        w_scale(tile.w_scale),
        bias(tile.bias),
        temb(nullptr),
        residual(tile.residual != nullptr ? tile.residual + r * tile.stride : nullptr),
        y(y) {
    if (acc2 != nullptr) x2_scale = _mm512_set1_ps(tile.x2_scale[r * tile.x2_scale_stride]);
    if (tile.temb != nullptr) {
      temb = tile.temb + (tile.first_row + r) / tile.rows_per_temb * tile.stride;
    }
  }

  template <typename Lanes>
  void write(int64_t n, const Lanes& lanes) const {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(lanes.load(acc + n)), x_scale);
    if (acc2 != nullptr) {
      const __m512 second = _mm512_cvtepi32_ps(lanes.load(acc2 + n));
      value = _mm512_add_ps(value, _mm512_mul_ps(second, x2_scale));
    }
    value = _mm512_mul_ps(value, lanes.load(w_scale + n));
    if (bias != nullptr) value = _mm512_add_ps(value, lanes.load(bias + n));
    if (temb != nullptr) value = _mm512_add_ps(value, lanes.load(temb + n));
    if (residual != nullptr) value = _mm512_add_ps(value, lanes.load(residual + n));
    lanes.store(y + n, value);
  }
};

void finish(const TileEpilogue& tile, float* y, int64_t y_stride) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const RowEpilogue row(tile, r, y + r * y_stride);
    int64_t n = 0;
    for (; n + 16 <= tile.columns; n += 16) row.write(n, AllLanes{});
    if (n < tile.columns) {
      row.write(n, FirstLanes{static_cast<__mmask16>((1u << (tile.columns - n)) - 1)});
    }
  }
}

}  // namespace

const Kernels* avx512_vnni_kernels() {
  static const Kernels kernels = vnni_kernels<Avx512Vnni>("avx512_vnni", finish);
  return &kernels;
}

}  // namespace ptq4adm

#else

namespace ptq4adm {
const Kernels* avx512_vnni_kernels() { return nullptr; }
}  // namespace ptq4adm

#endif
