// 16 floats in an AVX-512 register; see vector_math.h. AVX-512 F, BW, DQ, VL.
#pragma once

// GCC's own header starts unused operands from themselves and then warns about it
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

namespace ptq4adm {
namespace {

struct Avx512 {
  using Float = __m512;
  using Bits = __m512i;
  static constexpr int64_t kWidth = 16;

  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
  static void store_first(float* p, __m512 v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }

  static __m128i to_int8(__m512 v) {  // to even, the default rounding mode
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v));
  }
  static void store_int8(int8_t* p, __m512 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_int8(v));
  }
  static void store_int8_first(int8_t* p, __m512 v, int64_t n) {
    _mm_mask_storeu_epi8(p, first(n), to_int8(v));
  }

  static __m512 set(float v) { return _mm512_set1_ps(v); }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512 sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
  static __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static __m512 div(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
  static __m512 min(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
  static __m512 max(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
  static __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
  static __m512 multiply_subtract(__m512 a, __m512 b, __m512 c) { return _mm512_fmsub_ps(a, b, c); }
  static __m512 round(__m512 v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static __m512 scale_by_power(__m512 v, __m512 n) { return _mm512_scalef_ps(v, n); }
  static float sum(__m512 v) { return _mm512_reduce_add_ps(v); }
  static float largest_lane(__m512 v) { return _mm512_reduce_max_ps(v); }
  static float first_lane(__m512 v) { return _mm512_cvtss_f32(v); }

  static __m512i no_magnitude() { return _mm512_setzero_si512(); }
  static __m512i max_magnitude(__m512i largest, __m512 v) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    return _mm512_max_epi32(largest, bits);
  }
  static uint32_t largest(__m512i bits) {
    return static_cast<uint32_t>(_mm512_reduce_max_epi32(bits));
  }
};

}  // namespace
}  // namespace ptq4adm
