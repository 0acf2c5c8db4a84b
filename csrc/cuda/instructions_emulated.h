// instructions.h on the host: everything that touches memory or other threads is in emulator.cpp.
// Compile with -ffp-contract=off, or the compiler may fuse what add_rn and multiply_rn keep apart.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

namespace ptq4adm {

inline int thread_index() { return emulator::thread_index(); }
inline int lane_index() { return emulator::thread_index() % 32; }
inline int warp_index() { return emulator::thread_index() / 32; }
inline int block_index(int axis) { return emulator::block_index(axis); }
inline int grid_size(int axis) { return emulator::grid_size(axis); }
inline char* shared_memory() { return emulator::shared_memory(); }

inline void block_barrier() { emulator::block_barrier(); }

inline void copy_async_16(void* shared, const void* global, bool is_valid) {
  emulator::copy_async_16(shared, global, is_valid);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}

inline void load_matrix_x4(uint32_t (&fragment)[4], const void* shared_row) {
  emulator::load_matrix_x4(fragment, shared_row);
}
inline void multiply_s8_16x8x32(int32_t (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply_s8_16x8x32(acc, a, b);
}

// --- memory --------------------------------------------------------------------------------------

template <class T>
T load(const T* address) {
  T value;
  emulator::read(&value, address, sizeof(T), emulator::Memory::kAny, "load");
  return value;
}
template <class T>
void store(T* address, T value) {
  emulator::write(address, &value, sizeof(T), emulator::Memory::kAny, "store");
}
inline Bytes16 load_16(const void* address) {
  Bytes16 value;
  emulator::read(&value, address, 16, emulator::Memory::kAny, "load_16");
  return value;
}
inline void store_16(void* address, Bytes16 value) {
  emulator::write(address, &value, 16, emulator::Memory::kAny, "store_16");
}
inline Bytes16 load_stream_16(const void* global) {
  Bytes16 value;
  emulator::read(&value, global, 16, emulator::Memory::kConstant, "load_stream_16");
  return value;
}
inline Bytes16 load_l2_16(const void* global) {
  Bytes16 value;
  emulator::read(&value, global, 16, emulator::Memory::kGlobal, "load_l2_16");
  return value;
}
inline void store_l2_16(void* global, Bytes16 value) {
  emulator::write(global, &value, 16, emulator::Memory::kGlobal, "store_l2_16");
}
inline int count_arrival(int* counter) { return emulator::count_arrival(counter); }

// --- numbers -------------------------------------------------------------------------------------

namespace emulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// Drops the lowest `count` bits, to the nearest, ties to even.
inline uint32_t rounded_shift(uint32_t value, int count) {
  const uint32_t kept = value >> count;
  const uint32_t rest = value & ((1u << count) - 1);
  const uint32_t half = 1u << (count - 1);
  return kept + (rest > half || (rest == half && (kept & 1)));
}

}  // namespace emulator

inline float add_rn(float a, float b) { return a + b; }
inline float multiply_rn(float a, float b) { return a * b; }
inline float divide_rn(float a, float b) { return a / b; }
inline float erf_f32(float x) { return std::erf(x); }
inline float nan_f32() { return emulator::float_of(0x7fffffffu); }

inline int round_half_even(float x) {
  if (std::isnan(x)) return 0;
  if (x >= 2147483648.0f) return INT32_MAX;
  if (x <= -2147483648.0f) return INT32_MIN;
  const float below = std::floor(x);
  const float rest = x - below;  // exact: either below 2^23, or x is an integer
  const bool is_odd = std::fmod(below, 2.0f) != 0.0f;
  return static_cast<int>(below) + (rest > 0.5f || (rest == 0.5f && is_odd));
}

inline uint16_t half_from_float(float value) {
  const uint32_t bits = emulator::bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;                                 // NaN, canonical
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520 on
  if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);            // under 2^-25
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  if (exponent >= -14) {  // a carry of the rounding moves into the exponent, as it must
    return static_cast<uint16_t>(sign | (emulator::rounded_shift(magnitude, 13) - (112u << 10)));
  }
  const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
  return static_cast<uint16_t>(sign | emulator::rounded_shift(significand, -exponent - 1));
}

inline float float_from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 0x1fu;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 0x1f) return fraction ? nan_f32() : emulator::float_of(sign | 0x7f800000u);
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -magnitude : magnitude;
  }
  return emulator::float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = emulator::bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>(emulator::rounded_shift(bits, 16));
}

inline float float_from_bfloat16(uint16_t value) {
  return emulator::float_of(static_cast<uint32_t>(value) << 16);
}

}  // namespace ptq4adm
