// Where every number of a tile lies: in the registers of mma.m16n8k32, in shared memory, and in the
// weight. Pure functions of integers, the same on the host and the device.
//
//   register i of a lane holds, with t = lane % 4
//   A [16 rows, 32 k]        row lane / 4 + 8 (i % 2), k = 4 t + 16 (i / 2)
//   B [32 k, 8 columns]      column lane / 4, k = 4 t + 16 i
//   C [16, 8] int32          row lane / 4 + 8 (i / 2), column 2 t + i % 2
//
// A is the activations (rows are tokens or pixels), B the weight (columns are output channels).
// Four consecutive k of a register are its four bytes.
//
// Order of the weight (`cuda` in ptq4adm/ops/prepack.py): units of 16 channels by 64 k, all k of 16
// channels in turn. 64 k is the block of the canonical order, so a unit never straddles two taps
// and has one multiplier a channel; 16 channels make a lane's part of it 16 bytes at 4 bits: one
// load.
//
//   4 bits, 512 bytes:  [lane][half of the channels h][step of 32 k j]   32-bit words
//                       byte b of a word   | k + 16 | k |      channel 8 h + lane / 4,
//                                          bits 7..4  3..0     k = 32 j + 4 (lane % 4) + b
//   8 bits, 1024 bytes: [j][lane][h][k, k + 16]                          32-bit words
//
// A word of 4 bits becomes the two registers of one B fragment, without any exchange of lanes.

#pragma once

#include "instructions.h"

#ifdef __CUDACC__
#define PTQ4ADM_UNROLL _Pragma("unroll")
#define PTQ4ADM_ROLLED _Pragma("unroll 1")
#else
#define PTQ4ADM_UNROLL
#define PTQ4ADM_ROLLED
#endif

namespace ptq4adm {

// The value, by a way that the compiler cannot see through. What follows from it is computed where
// it is used: computed ahead of the main loop, it would take registers that the loop needs.
PTQ4ADM_DEVICE int hidden(int value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Has the value computed before what follows, whatever the compiler would rather do: it moves
// arithmetic past the instructions that it is meant to hide behind.
PTQ4ADM_DEVICE void settle(uint32_t& value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#else
  (void)value;
#endif
}

// The value, which all lanes of a warp share. Asked of one lane, so that the compiler knows it and
// takes a branch on it for one of the whole warp: what is counted behind it may then stay in
// registers of the warp.
PTQ4ADM_DEVICE int warp_uniform(int value) {
#ifdef __CUDACC__
  return __shfl_sync(0xffffffffu, value, 0);
#else
  return value;
#endif
}

constexpr int kLanes = 32;
constexpr int kBlockK = 64;        // k of one step: ptq4adm/packing/layout.py, BLOCK_K
constexpr int kUnitChannels = 16;  // channels of a unit of the weight
constexpr int kRowBytes = kBlockK;
constexpr int kChunkBytes = 16;
constexpr int kRowChunks = kRowBytes / kChunkBytes;

enum class Weight { kInt4, kInt4Groups, kInt8 };

PTQ4ADM_BOTH constexpr int unit_bytes(Weight weight) {
  return kUnitChannels * kBlockK / (weight == Weight::kInt8 ? 1 : 2);
}

// --- activations in shared memory ---------------------------------------------------------------

// Byte of a chunk of 16 k of a row. Two rows fill the 32 banks; exchanging chunks by row / 2 puts
// one chunk of eight consecutive rows (ldmatrix) on eight different groups of four banks. A
// quarter-warp of copies writes two whole rows, which are different groups in any order.
PTQ4ADM_BOTH constexpr int tile_offset(int row, int chunk) {
  return row * kRowBytes + (chunk ^ (row / 2 % kRowChunks)) * kChunkBytes;
}

// Which row and chunk a lane addresses for ldmatrix.x4 of an A fragment: matrices in the order of
// the registers.
PTQ4ADM_BOTH constexpr int a_row(int lane) { return lane % 16; }
PTQ4ADM_BOTH constexpr int a_chunk(int lane, int k_step) { return 2 * k_step + lane / 16; }

// --- results ------------------------------------------------------------------------------------

PTQ4ADM_BOTH constexpr int c_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
PTQ4ADM_BOTH constexpr int c_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

// Byte of a column of a staged row of `columns` 32-bit words. Eights of columns are exchanged by
// the row, so that rows written together lie on different banks. Of mma.m16n8k32 half a warp writes
// pairs in four neighbouring rows: `shift` 0. Of wgmma.m64nNk32, whose result is transposed, a warp
// writes eight columns of every other row of eight: `shift` 1. Who reads a line reads all of it, so
// any exchange within 128 bytes will do.
PTQ4ADM_BOTH constexpr int stage_offset(int row, int column, int columns, int shift) {
  return (row * columns + (column ^ ((row >> shift & 3) * 8))) * 4;
}

// Output channel of a column of a tile, N or more if there is none. A gated tile holds sixteen
// values, their sixteen gates, sixteen values ...: whole units, so the weight's order is that of
// the plain product. N / 2 is then a multiple of 16.
PTQ4ADM_BOTH constexpr int tile_channel(int first_column, int column, int N, bool is_gated) {
  if (!is_gated) return first_column + column;
  const int channel = first_column / 2 + column / 32 * 16 + column % 16;
  return channel < N / 2 ? channel + column / 16 % 2 * (N / 2) : N;
}

// --- weights ------------------------------------------------------------------------------------

// Byte of a lane's first 16 in a unit; at 8 bits the second step of 32 k lies 512 bytes further.
PTQ4ADM_BOTH constexpr int unit_offset(int lane) { return lane * 16; }
constexpr int kUnitStepBytes = kLanes * 16;

// Eight nibbles to 16 times their values, sign included: three instructions. The factor leaves with
// the sums, which are exact.
PTQ4ADM_BOTH void decode_int4(uint32_t (&b)[2], uint32_t word) {
  b[0] = (word << 4) & 0xf0f0f0f0u;
  b[1] = word & 0xf0f0f0f0u;
}

// Eight nibbles times the multiplier s of their group, four bytes at once: (w + 8) s + 128 - 8 s
// stays in 0..255 for s in 1..15, so no byte carries into the next.
PTQ4ADM_BOTH void decode_int4_groups(uint32_t (&b)[2], uint32_t word, uint32_t multiplier) {
  const uint32_t offset = (128u - 8u * multiplier) * 0x01010101u;
  b[0] = (((word & 0x0f0f0f0fu) ^ 0x08080808u) * multiplier + offset) ^ 0x80808080u;
  b[1] = ((((word >> 4) & 0x0f0f0f0fu) ^ 0x08080808u) * multiplier + offset) ^ 0x80808080u;
}

}  // namespace ptq4adm
