// AVX-VNNI (256-bit vpdpbusd, VEX-encoded) inner loops: tiles of 6 rows x 16 channels.

#include "kernels.h"

#if defined(__AVX2__) && defined(__AVXVNNI__)

#include "vnni256.h"
#include "vnni_tile.h"

namespace ptq4adm {
namespace {

struct AvxVnni : Vector256 {
  static Vector dot(Vector acc, Vector u8, Vector s8) {
    return _mm256_dpbusd_avx_epi32(acc, u8, s8);
  }
};

}  // namespace

const Kernels* avx_vnni_kernels() {
  static const Kernels kernels = vnni_kernels<AvxVnni>("avx_vnni", avx2_kernels()->finish);
  return &kernels;
}

}  // namespace ptq4adm

#else

namespace ptq4adm {
const Kernels* avx_vnni_kernels() { return nullptr; }
}  // namespace ptq4adm

#endif
