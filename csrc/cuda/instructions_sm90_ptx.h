// instructions_sm90.h on a GPU: inline PTX for sm_90a, one instruction a function.
#pragma once

#include <cstdint>

namespace ptq4adm {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- barriers ------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Two fences: the first publishes the init, the second carries it to the proxy that lands the
// bytes.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// try_wait sleeps for a time that the hardware limits, so it is asked again.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  uint32_t has_completed;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(has_completed)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (has_completed == 0);
}
__device__ __forceinline__ void warpgroup_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- copies --------------------------------------------------------------------------------------

__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// shared::cluster, which a block's own addresses belong to: the form with shared::cta is younger
// than the oldest nvcc.
__device__ __forceinline__ void copy_box_2d(void* shared, const TensorMap* map, int c0, int c1,
                                            Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(map), "r"(c0), "r"(c1), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void copy_box_4d(void* shared, const TensorMap* map, int c0, int c1,
                                            int c2, int c3, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(barrier))
      : "memory");
}

// --- products ------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  static_assert(kPending >= 0 && kPending <= 7, "wgmma.wait_group counts up to 7 groups");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Without .satfinite: sums wrap. Sizes: those defined below.
template <int kN>
__device__ __forceinline__ void wgmma_s8_64xNx32(int32_t (&acc)[kN / 2], const uint32_t (&a)[4],
                                                 uint64_t descriptor) = delete;

// Names and operands of a run of ten registers, and of the two to six that come after some tens.
#define PTQ4ADM_NAMES_2(t) "%" #t "0, %" #t "1"
#define PTQ4ADM_NAMES_4(t) PTQ4ADM_NAMES_2(t) ", %" #t "2, %" #t "3"
#define PTQ4ADM_NAMES_6(t) PTQ4ADM_NAMES_4(t) ", %" #t "4, %" #t "5"
#define PTQ4ADM_NAMES_8(t) PTQ4ADM_NAMES_6(t) ", %" #t "6, %" #t "7"
#define PTQ4ADM_NAMES_10(t) PTQ4ADM_NAMES_8(t) ", %" #t "8, %" #t "9"
#define PTQ4ADM_NAMES_30 PTQ4ADM_NAMES_10() ", " PTQ4ADM_NAMES_10(1) ", " PTQ4ADM_NAMES_10(2)
#define PTQ4ADM_NAMES_60 \
  PTQ4ADM_NAMES_30 ", " PTQ4ADM_NAMES_10(3) ", " PTQ4ADM_NAMES_10(4) ", " PTQ4ADM_NAMES_10(5)
#define PTQ4ADM_NAMES_90 \
  PTQ4ADM_NAMES_60 ", " PTQ4ADM_NAMES_10(6) ", " PTQ4ADM_NAMES_10(7) ", " PTQ4ADM_NAMES_10(8)
#define PTQ4ADM_NAMES_120 \
  PTQ4ADM_NAMES_90 ", " PTQ4ADM_NAMES_10(9) ", " PTQ4ADM_NAMES_10(10) ", " PTQ4ADM_NAMES_10(11)

#define PTQ4ADM_SUMS_4(i) "+r"(acc[i]), "+r"(acc[i + 1]), "+r"(acc[i + 2]), "+r"(acc[i + 3])
#define PTQ4ADM_SUMS_8(i) PTQ4ADM_SUMS_4(i), PTQ4ADM_SUMS_4(i + 4)
#define PTQ4ADM_SUMS_16(i) PTQ4ADM_SUMS_8(i), PTQ4ADM_SUMS_8(i + 8)
#define PTQ4ADM_SUMS_32(i) PTQ4ADM_SUMS_16(i), PTQ4ADM_SUMS_16(i + 16)
#define PTQ4ADM_SUMS_64(i) PTQ4ADM_SUMS_32(i), PTQ4ADM_SUMS_32(i + 32)

// The operands' numbers go on after the sums: four of a, then the descriptor.
#define PTQ4ADM_WGMMA(n, names, a0, a1, a2, a3, b, ...)                     \
  template <>                                                               \
  __device__ __forceinline__ void wgmma_s8_64xNx32<n>(                      \
      int32_t (&acc)[n / 2], const uint32_t (&a)[4], uint64_t descriptor) { \
    asm volatile(                                                           \
        "{\n"                                                               \
        ".reg .pred p;\n"                                                   \
        "setp.eq.u32 p, 0, 0;\n"                                            \
        "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" names      \
        "}, "                                                               \
        "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b                    \
        ", p;\n"                                                            \
        "}"                                                                 \
        : __VA_ARGS__                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));     \
  }

PTQ4ADM_WGMMA(32, PTQ4ADM_NAMES_10() ", " PTQ4ADM_NAMES_6(1), 16, 17, 18, 19, 20,
              PTQ4ADM_SUMS_16(0))
PTQ4ADM_WGMMA(64, PTQ4ADM_NAMES_30 ", " PTQ4ADM_NAMES_2(3), 32, 33, 34, 35, 36, PTQ4ADM_SUMS_32(0))
PTQ4ADM_WGMMA(96, PTQ4ADM_NAMES_30 ", " PTQ4ADM_NAMES_10(3) ", " PTQ4ADM_NAMES_8(4), 48, 49, 50, 51,
              52, PTQ4ADM_SUMS_32(0), PTQ4ADM_SUMS_16(32))
PTQ4ADM_WGMMA(128, PTQ4ADM_NAMES_60 ", " PTQ4ADM_NAMES_4(6), 64, 65, 66, 67, 68, PTQ4ADM_SUMS_64(0))
PTQ4ADM_WGMMA(192, PTQ4ADM_NAMES_90 ", " PTQ4ADM_NAMES_6(9), 96, 97, 98, 99, 100,
              PTQ4ADM_SUMS_64(0), PTQ4ADM_SUMS_32(64))
PTQ4ADM_WGMMA(256, PTQ4ADM_NAMES_120 ", " PTQ4ADM_NAMES_8(12), 128, 129, 130, 131, 132,
              PTQ4ADM_SUMS_64(0), PTQ4ADM_SUMS_64(64))

#undef PTQ4ADM_WGMMA
#undef PTQ4ADM_SUMS_64
#undef PTQ4ADM_SUMS_32
#undef PTQ4ADM_SUMS_16
#undef PTQ4ADM_SUMS_8
#undef PTQ4ADM_SUMS_4
#undef PTQ4ADM_NAMES_120
#undef PTQ4ADM_NAMES_90
#undef PTQ4ADM_NAMES_60
#undef PTQ4ADM_NAMES_30
#undef PTQ4ADM_NAMES_10
#undef PTQ4ADM_NAMES_8
#undef PTQ4ADM_NAMES_6
#undef PTQ4ADM_NAMES_4
#undef PTQ4ADM_NAMES_2

// --- registers -----------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void registers_increase() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0,
                "setmaxnreg takes multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_decrease() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0,
                "setmaxnreg takes multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace ptq4adm
