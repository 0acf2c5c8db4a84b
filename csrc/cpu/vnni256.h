// 256-bit vectors for vnni_tile.h. Included only by files compiled with -mavx2 and more.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace ptq4adm {
namespace {

// Everything but the dot product.
struct Vector256 {
  using Vector = __m256i;
  static constexpr int64_t kBytes = 32;
  static constexpr int64_t kRows = 6;  // 12 accumulators, 2 weights, 1 broadcast: 15 of 16
  static constexpr int64_t kPanels = 1;

  static Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Vector v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Vector splat32(int32_t value) { return _mm256_set1_epi32(value); }
  static Vector splat8(int8_t value) { return _mm256_set1_epi8(value); }
  static Vector broadcast32(const void* p) {
    int32_t value = 0;
    std::memcpy(&value, p, sizeof value);
    return _mm256_set1_epi32(value);
  }
  static void keep_in_register(Vector& v) { asm volatile("" : "+x"(v)); }
  static Vector flip_sign_bits(Vector v) { return _mm256_xor_si256(v, splat8(-128)); }

  static int32_t sum32(Vector v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
    return _mm_cvtsi128_si32(sum);
  }

  static void store_nibbles(const uint8_t* packed, uint8_t* out) {
    const __m256i bytes = load(packed), low = splat8(0x0F);
    store(out, _mm256_and_si256(bytes, low));
    store(out + 32, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
  }

  static Vector scale_nibbles(Vector nibbles, Vector mult) {
    const __m256i even =
        _mm256_mullo_epi16(_mm256_and_si256(nibbles, _mm256_set1_epi16(0xFF)), mult);
    const __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(nibbles, 8), mult);
    const __m256i product = _mm256_or_si256(even, _mm256_slli_epi16(odd, 8));
    const __m256i byte_mult = _mm256_or_si256(mult, _mm256_slli_epi16(mult, 8));
    const __m256i eight_fold = _mm256_slli_epi16(byte_mult, 3);  // 8 * 15 = 120 stays in its byte
    return _mm256_add_epi8(product, _mm256_sub_epi8(splat8(-128), eight_fold));
  }
};

}  // namespace
}  // namespace ptq4adm
