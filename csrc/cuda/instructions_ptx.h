// instructions.h on a GPU: inline PTX, one instruction a function, from sm_80 on.
//
// Everything that touches memory is volatile, so that the compiler keeps its order against the
// barriers; where it also has to forget what it knows of memory, the clobber says so.
#pragma once

#include <cstdint>

namespace ptq4adm {

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }
__device__ __forceinline__ int block_index(int axis) {
  return static_cast<int>(axis == 0 ? blockIdx.x : axis == 1 ? blockIdx.y : blockIdx.z);
}
__device__ __forceinline__ int grid_size(int axis) {
  return static_cast<int>(axis == 0 ? gridDim.x : axis == 1 ? gridDim.y : gridDim.z);
}
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char ptq4adm_shared_memory[];
  return ptq4adm_shared_memory;
}

// bar.sync 0, and the compiler knows it for a barrier
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool is_valid) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int source_bytes = is_valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target),
               "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&fragment)[4], const void* shared_row) {
  const uint32_t row = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row)
               : "memory");
}

// Without .satfinite: a sum past 2^31 wraps, as in every other backend.
__device__ __forceinline__ void multiply_s8_16x8x32(int32_t (&acc)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- memory --------------------------------------------------------------------------------------

// Plain, so that the compiler picks the address space and may join neighbours.
template <class T>
__device__ __forceinline__ T load(const T* address) {
  return *address;
}
template <class T>
__device__ __forceinline__ void store(T* address, T value) {
  *address = value;
}
__device__ __forceinline__ Bytes16 load_16(const void* address) {
  return *static_cast<const Bytes16*>(address);
}
__device__ __forceinline__ void store_16(void* address, Bytes16 value) {
  *static_cast<Bytes16*>(address) = value;
}
__device__ __forceinline__ Bytes16 load_stream_16(const void* global) {
  Bytes16 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(__cvta_generic_to_global(global)));
  return value;
}
__device__ __forceinline__ Bytes16 load_l2_16(const void* global) {
  Bytes16 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return value;
}
__device__ __forceinline__ void store_l2_16(void* global, Bytes16 value) {
  asm volatile(
      "st.global.cg.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
      "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
      : "memory");
}
__device__ __forceinline__ int count_arrival(int* counter) {
  int old;
  asm volatile("atom.global.acq_rel.gpu.add.s32 %0, [%1], 1;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return old;
}

// --- numbers -------------------------------------------------------------------------------------
// By name, not by operator: neither a flag nor an optimization may fuse or flush them.

__device__ __forceinline__ float add_rn(float a, float b) {
  float sum;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}
__device__ __forceinline__ float multiply_rn(float a, float b) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}
__device__ __forceinline__ float divide_rn(float a, float b) {
  float quotient;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
}
__device__ __forceinline__ int round_half_even(float x) {
  int nearest;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(nearest) : "f"(x));
  return nearest;
}
__device__ __forceinline__ float erf_f32(float x) { return erff(x); }
__device__ __forceinline__ float nan_f32() { return __int_as_float(0x7fffffff); }

__device__ __forceinline__ uint16_t half_from_float(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
__device__ __forceinline__ float float_from_half(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
__device__ __forceinline__ uint16_t bfloat16_from_float(float value) {
  uint16_t rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return rounded;
}
__device__ __forceinline__ float float_from_bfloat16(uint16_t value) {
  return __uint_as_float(static_cast<uint32_t>(value) << 16);
}

}  // namespace ptq4adm
