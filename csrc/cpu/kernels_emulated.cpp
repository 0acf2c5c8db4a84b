// The VNNI tables without the instructions: every vector operation as a loop over bytes or lanes.
//
// A build for tests (PTQ4ADM_EMULATE_VNNI) runs the very templates of the two VNNI files on any
// processor. Each function states what its instruction does, modulo 2^32 included.

#ifdef PTQ4ADM_EMULATE_VNNI

#include "epilogue.h"
#include "kernels.h"
#include "vnni_tile.h"

namespace ptq4adm {
namespace {

template <int64_t kWidthBytes, int64_t kTileRows, int64_t kTilePanels>
struct Emulated {
  static constexpr int64_t kBytes = kWidthBytes;
  static constexpr int64_t kRows = kTileRows;
  static constexpr int64_t kPanels = kTilePanels;
  struct Vector {
    uint8_t byte[kBytes];
  };

  template <typename T>
  static T get(const Vector& v, int64_t lane) {
    T value;
    std::memcpy(&value, v.byte + lane * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  template <typename T>
  static void set(Vector& v, int64_t lane, T value) {
    std::memcpy(v.byte + lane * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
  }

  static Vector load(const void* p) {
    Vector v;
    std::memcpy(v.byte, p, sizeof v.byte);
    return v;
  }
  static void store(void* p, const Vector& v) { std::memcpy(p, v.byte, sizeof v.byte); }
  static Vector splat32(int32_t value) {
    Vector v;
    for (int64_t lane = 0; lane < kBytes / 4; ++lane) set(v, lane, value);
    return v;
  }
  static Vector splat8(int8_t value) {
    Vector v;
    for (int64_t lane = 0; lane < kBytes; ++lane) set(v, lane, value);
    return v;
  }
  static Vector broadcast32(const void* p) {
    int32_t value = 0;
    std::memcpy(&value, p, sizeof value);
    return splat32(value);
  }
  // vpdpbusd
  static Vector dot(const Vector& acc, const Vector& u8, const Vector& s8) {
    Vector sum;
    for (int64_t lane = 0; lane < kBytes / 4; ++lane) {
      int32_t products = 0;
      for (int64_t i = 4 * lane; i < 4 * lane + 4; ++i) {
        products += static_cast<int32_t>(u8.byte[i]) * get<int8_t>(s8, i);
      }
      set(sum, lane, get<uint32_t>(acc, lane) + static_cast<uint32_t>(products));
    }
    return sum;
  }
  static void keep_in_register(const Vector&) {}
  static int32_t sum32(const Vector& v) {
    uint32_t sum = 0;
    for (int64_t lane = 0; lane < kBytes / 4; ++lane) sum += get<uint32_t>(v, lane);
    return static_cast<int32_t>(sum);
  }
  static Vector flip_sign_bits(Vector v) {
    for (uint8_t& byte : v.byte) byte = static_cast<uint8_t>(byte ^ 0x80u);
    return v;
  }
  static void store_nibbles(const uint8_t* packed, uint8_t* out) {
    for (int64_t i = 0; i < 32; ++i) {
      out[i] = packed[i] & 0x0Fu;
      out[i + 32] = static_cast<uint8_t>(packed[i] >> 4);
    }
  }
  static Vector scale_nibbles(Vector nibbles, const Vector& mult) {
    for (int64_t i = 0; i < kBytes; ++i) {
      const int32_t m = get<int16_t>(mult, i / 2);
      nibbles.byte[i] = static_cast<uint8_t>(nibbles.byte[i] * m + 128 - 8 * m);
    }
    return nibbles;
  }
};

}  // namespace

const Kernels& emulated_avx_vnni_kernels() {
  static const Kernels kernels =
      vnni_kernels<Emulated<32, 6, 1>>("emulated_avx_vnni", finish_scalar);
  return kernels;
}

const Kernels& emulated_avx512_vnni_kernels() {
  static const Kernels kernels =
      vnni_kernels<Emulated<64, 6, 4>>("emulated_avx512_vnni", finish_scalar);
  return kernels;
}

}  // namespace ptq4adm

#endif
