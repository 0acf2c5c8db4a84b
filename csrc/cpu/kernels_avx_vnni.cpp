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
  using S = AvxVnni;
  // 1024 k x 16 channels: 16 KiB of panel stay in L1
  static const Kernels kernels{"avx_vnni",
                               S::kRows,
                               S::kPanels,
                               1024,
                               1,
                               vnni_format<S>(8, vnni_decode_w4<S>),
                               vnni_format<S>(128, vnni_decode_w4_groups<S>),
                               vnni_format<S>(128, vnni_decode_w8<S>),
                               vnni_sum_row<S>,
                               avx2_kernels()->finish};
  return &kernels;
}

}  // namespace ptq4adm

#else

namespace ptq4adm {
const Kernels* avx_vnni_kernels() { return nullptr; }
}  // namespace ptq4adm

#endif
