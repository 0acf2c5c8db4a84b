// One float; see vector_math.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace ptq4adm {
namespace {

struct Scalar {
  using Float = float;
  using Bits = uint32_t;
  static constexpr int64_t kWidth = 1;

  static float load(const float* p) { return *p; }
  static float load_first(const float* p, int64_t) { return *p; }
  static void store(float* p, float v) { *p = v; }
  static void store_first(float* p, float v, int64_t) { *p = v; }
  static void store_int8(int8_t* p, float v) { *p = static_cast<int8_t>(round(v)); }
  static void store_int8_first(int8_t* p, float v, int64_t) { store_int8(p, v); }

  static float set(float v) { return v; }
  static float add(float a, float b) { return a + b; }
  static float sub(float a, float b) { return a - b; }
  static float mul(float a, float b) { return a * b; }
  static float div(float a, float b) { return a / b; }
  static float multiply_add(float a, float b, float c) { return a * b + c; }
  static float multiply_subtract(float a, float b, float c) { return a * b - c; }
  static float sum(float v) { return v; }
  static float largest_lane(float v) { return v; }
  static float first_lane(float v) { return v; }
  // as the vector instructions: b if one of them is NaN, so a bound replaces NaN
  static float min(float a, float b) { return a < b ? a : b; }
  static float max(float a, float b) { return a > b ? a : b; }

  // For |v| < 2^22: there the sum has no bits below 1, and addition rounds to even.
  static float round(float v) {
    constexpr float kNoFraction = 12582912.0f;  // 1.5 * 2^23
    return (v + kNoFraction) - kNoFraction;
  }

  static float scale_by_power(float v, float n) {  // -126 <= n <= 127
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power = 0.0f;
    std::memcpy(&power, &bits, sizeof power);
    return v * power;
  }

  static uint32_t no_magnitude() { return 0; }
  static uint32_t max_magnitude(uint32_t largest, float v) {
    uint32_t bits = 0;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= 0x7fffffffu;
    return bits > largest ? bits : largest;
  }
  static uint32_t largest(uint32_t bits) { return bits; }
};

}  // namespace
}  // namespace ptq4adm
