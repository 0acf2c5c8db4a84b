// instructions.h, and what compute capability 9.0a adds: barriers in shared memory, copies of boxes
// by TMA, and the asynchronous products of a warpgroup (four warps, the first a multiple of four).
//
//   barriers    barrier_init                         mbarrier.init
//               barrier_init_fence                   fence.mbarrier_init, fence.proxy.async
//               barrier_arrive                       mbarrier.arrive.release.cta
//               barrier_arrive_expect(bytes)         mbarrier.arrive.expect_tx.release.cta
//               barrier_wait(parity)                 mbarrier.try_wait.parity.acquire.cta, again
//                                                    and again until it is true
//               warpgroup_barrier(id, threads)       bar.sync of a named barrier, 1 to 15
//   copies      copy_box_2d, copy_box_4d             cp.async.bulk.tensor, by one thread
//               prefetch_tensor_map                  prefetch.tensormap
//               async_proxy_fence                    fence.proxy.async.shared::cta
//   products    wgmma_fence, wgmma_commit, wgmma_wait<N>
//               wgmma_s8_64xNx32<N>                  wgmma.mma_async m64nNk32 s8 -> s32, A in
//                                                    registers, B in shared memory; acc += A B
//               matrix_descriptor                    of B: [N][64 bytes] of K, 64-byte swizzle
//   registers   registers_increase<R>, registers_decrease<R>     setmaxnreg
//
// The phases of a barrier count from 0; `barrier_wait(b, p)` returns when the newest phase that has
// completed has parity p, so on a new barrier a wait for parity 1 returns at once. A phase
// completes when all its arrivals have come and all bytes that were expected have landed.
#pragma once

#include <cstdint>

#include "instructions.h"
#include "tensor_map.h"

namespace ptq4adm {

using Barrier = uint64_t;

}  // namespace ptq4adm

#ifdef __CUDACC__
#include "instructions_sm90_ptx.h"
#else
#include "instructions_sm90_emulated.h"
#endif

namespace ptq4adm {

constexpr int kSwizzleAtomBytes = 512;  // 8 rows of 64 bytes: tiles of B begin at a multiple of it

// Descriptor of B for wgmma_s8_64xNx32: N rows of 64 bytes of K side by side, under the 64-byte
// swizzle, from a multiple of 512 bytes on. For the second 32 of the 64 k, point 32 bytes further.
//
//   bits  0-13  start / 16
//   bits 16-29  leading offset / 16, unused by this layout: 1
//   bits 32-45  stride / 16, from eight rows to the next eight
//   bits 49-51  0, the tile is aligned
//   bits 62-63  2, the 64-byte swizzle
PTQ4ADM_DEVICE uint64_t matrix_descriptor(const void* shared) {
  const uint64_t start = (shared_address(shared) & 0x3ffffu) >> 4;
  return start | uint64_t{1} << 16 | uint64_t{kSwizzleAtomBytes / 16} << 32 | uint64_t{2} << 62;
}

}  // namespace ptq4adm
