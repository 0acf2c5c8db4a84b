// instructions_sm90.h on the host: emulator_barriers.cpp, emulator_boxes.cpp and
// emulator_wgmma.cpp.
#pragma once

#include <cstdint>

#include "emulator.h"

namespace ptq4adm {

// Where it lies in the block's shared memory, whose first byte is 0 here.
inline uint32_t shared_address(const void* shared) { return emulator::shared_address(shared); }

// --- barriers ------------------------------------------------------------------------------------

inline void barrier_init(Barrier* barrier, int arrivals) {
  emulator::barrier_init(barrier, arrivals);
}
inline void barrier_init_fence() { emulator::barrier_init_fence(); }
inline void barrier_arrive(Barrier* barrier) { emulator::barrier_arrive(barrier); }
inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
  emulator::barrier_arrive_expect(barrier, bytes);
}
inline void barrier_wait(Barrier* barrier, int parity) { emulator::barrier_wait(barrier, parity); }
inline void warpgroup_barrier(int id, int threads) { emulator::named_barrier(id, threads); }

// --- copies --------------------------------------------------------------------------------------

inline void async_proxy_fence() { emulator::async_proxy_fence(); }
inline void prefetch_tensor_map(const TensorMap* map) { emulator::prefetch_tensor_map(map); }
inline void copy_box_2d(void* shared, const TensorMap* map, int c0, int c1, Barrier* barrier) {
  const int start[] = {c0, c1};
  emulator::copy_box(shared, map, 2, start, barrier);
}
inline void copy_box_4d(void* shared, const TensorMap* map, int c0, int c1, int c2, int c3,
                        Barrier* barrier) {
  const int start[] = {c0, c1, c2, c3};
  emulator::copy_box(shared, map, 4, start, barrier);
}

// --- products ------------------------------------------------------------------------------------

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  static_assert(kPending >= 0 && kPending <= 7, "wgmma.wait_group counts up to 7 groups");
  emulator::wgmma_wait(kPending);
}
template <int kN>
void wgmma_s8_64xNx32(int32_t (&acc)[kN / 2], const uint32_t (&a)[4], uint64_t descriptor) {
  static_assert(kN == 32 || kN == 64 || kN == 96 || kN == 128 || kN == 192 || kN == 256,
                "the sizes that instructions_sm90_ptx.h has");
  emulator::wgmma(acc, a, descriptor, kN);
}

// --- registers -----------------------------------------------------------------------------------

template <int kRegisters>
void registers_increase() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0,
                "setmaxnreg takes multiples of 8 from 24 to 256");
  emulator::set_registers(kRegisters, true);
}
template <int kRegisters>
void registers_decrease() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0,
                "setmaxnreg takes multiples of 8 from 24 to 256");
  emulator::set_registers(kRegisters, false);
}

}  // namespace ptq4adm
