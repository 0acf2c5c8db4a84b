// What a kernel may ask of the machine, one instruction a function: PTX under nvcc, an emulation of
// it under a host compiler. Kernels are written over these functions only, so that their whole
// bodies run on a machine without a GPU and can be tested bit for bit.
//
// Names say what is done; the comment names the instruction. Semantics are those of the PTX manual:
// what it leaves undefined, the emulation refuses or poisons (docs/emulation.md).
//
//   identity    thread_index, lane_index, warp_index                     %tid.x
//               block_index(axis), grid_size(axis)                       %ctaid, %nctaid
//               shared_memory()          dynamic shared memory, aligned to 1024 bytes
//   barriers    block_barrier                                            bar.sync 0
//   copies      copy_async_16, copy_async_commit, copy_async_wait<N>     cp.async.cg (zero fill)
//   fragments   load_matrix_x4                                           ldmatrix.m8n8.x4.b16
//   products    multiply_s8_16x8x32                                      mma.sync.m16n8k32, s8
//   memory      load<T>, store<T>, load_16, store_16                     ld, st (any space)
//               load_stream_16, of what no thread of the grid writes     ld.global.nc.no_allocate
//               load_l2_16, store_l2_16                                  ld, st.global.cg
//               count_arrival, returns the count before                  atom.global.acq_rel.gpu
//   numbers     add_rn, multiply_rn, divide_rn   never contracted        add.rn, mul.rn, div.rn
//               round_half_even      saturates, NaN gives 0              cvt.rni.s32.f32
//               half_from_float, float_from_half, bfloat16_from_float, float_from_bfloat16
//               erf_f32, nan_f32
//
// Between two barriers a thread may read what it wrote itself, and nobody else's bytes. A copy is
// readable for the thread that issued it once it has waited for its group, and for the others after
// the next barrier. Kernels touch shared and global memory through these functions alone: a plain
// `pointer[i]` works on a GPU and escapes every check of the emulator.

#pragma once

#include <cstdint>

namespace ptq4adm {

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

}  // namespace ptq4adm

#ifdef __CUDACC__
#define PTQ4ADM_DEVICE __device__ __forceinline__
#define PTQ4ADM_BOTH __host__ __device__ __forceinline__
#include "instructions_ptx.h"
#else
#define PTQ4ADM_DEVICE inline
#define PTQ4ADM_BOTH inline
#include "instructions_emulated.h"
#endif
