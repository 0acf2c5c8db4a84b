// 8 floats in an AVX2 register; see vector_math.h. AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace ptq4adm {
namespace {

struct Avx2 {
  using Float = __m256;
  using Bits = __m256i;
  static constexpr int64_t kWidth = 8;

  static __m256i first(int64_t n) {
    static const int32_t lanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + kWidth - n));
  }
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
  static void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
  static void store_first(float* p, __m256 v, int64_t n) { _mm256_maskstore_ps(p, first(n), v); }

  static __m128i to_int8(__m256 v) {                // in the low 8 bytes
    const __m256i rounded = _mm256_cvtps_epi32(v);  // to even, the default rounding mode
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    return _mm_packs_epi16(words, words);
  }
  static void store_int8(int8_t* p, __m256 v) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), to_int8(v));
  }
  static void store_int8_first(int8_t* p, __m256 v, int64_t n) {
    int8_t bytes[kWidth];
    store_int8(bytes, v);
    std::memcpy(p, bytes, static_cast<size_t>(n));
  }

  static __m256 set(float v) { return _mm256_set1_ps(v); }
  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
  static __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256 div(__m256 a, __m256 b) { return _mm256_div_ps(a, b); }
  static __m256 min(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
  static __m256 max(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
  static __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
  static __m256 multiply_subtract(__m256 a, __m256 b, __m256 c) { return _mm256_fmsub_ps(a, b, c); }
  static __m256 round(__m256 v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static __m256 scale_by_power(__m256 v, __m256 n) {  // adds n to the exponent of v
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponent));
  }
  static float sum(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static float largest_lane(__m256 v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static float first_lane(__m256 v) { return _mm256_cvtss_f32(v); }

  static __m256i no_magnitude() { return _mm256_setzero_si256(); }
  static __m256i max_magnitude(__m256i largest, __m256 v) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epi32(largest, bits);
  }
  static uint32_t largest(__m256i bits) {
    alignas(32) uint32_t lanes[kWidth];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), bits);
    uint32_t largest = 0;
    for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
  }
};

}  // namespace
}  // namespace ptq4adm
