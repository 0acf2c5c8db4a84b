// What a kernel may ask of the machine, one instruction a function: PTX under nvcc, an emulation of
// it under a host compiler. Kernels are written over these functions only, so that their whole
// bodies run on a machine without a GPU and can be tested bit for bit.
//
// Names say what is done; the comment names the instruction. Semantics are those of the PTX manual:
// what it leaves undefined, the emulation refuses or poisons.
//
//   identity    thread_index, lane_index, warp_index, block_index       %tid, %laneid, %ctaid
//   barriers    block_barrier                                            bar.sync 0
//   copies      copy_async_16, copy_async_commit, copy_async_wait<N>     cp.async.cg (zero fill)
//   fragments   load_matrix_x4                                           ldmatrix.m8n8.x4.b16
//   products    multiply_s8_16x8x32                                      mma.sync.m16n8k32 s8 -> s32
//   memory      load_stream_16, load_l2_16, store_l2_16, count_arrival   ld/st.global, atom.acq_rel
//   numbers     add_rn, multiply_rn, divide_rn, round_half_even, erf_f32, half and bfloat16

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PTQ4ADM_DEVICE __device__ __forceinline__
#define PTQ4ADM_BOTH __host__ __device__ __forceinline__
#include "instructions_ptx.h"
#else
#define PTQ4ADM_DEVICE inline
#define PTQ4ADM_BOTH inline
#include "instructions_emulated.h"
#endif
