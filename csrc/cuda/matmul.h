// Launching matrix products on a GPU: which tiles there are, and running one.

#pragma once

#include <vector>

#include "params.h"

namespace ptq4adm {

struct Tile {
  int block_m;  // rows
  int block_n;  // channels
};

struct TileInfo {
  Tile tile;
  int warps;
  int stages;
  int shared_bytes[2];  // of a block: with one segment of K, with two
};

// Every tile that launch_matmul takes, the largest first.
std::vector<TileInfo> matmul_tiles();

// Start a product on a stream (cudaStream_t) of the current device. Returns null, or what is wrong:
// a sentence of this library or of CUDA, valid until the next call of the thread.
//
// `bits` is 4 or 8; with w_mult, 4. `is_convolution` reads params.window. Sizes, alignment and
// addresses are the caller's to check (ptq4adm/ops/cuda_matmul.py).
const char* launch_matmul(const Params& params, int bits, bool is_convolution, const Tile& tile,
                          void* stream);

// --- compute capability 9.0a: matmul_sm90.h; only in builds with PTQ4ADM_HAS_SM90A ---------------

// Rows of a tile as a box of pixels, at most block_m: columns x rows x images of a convolution's
// output; block_m x 1 x 1 of a product of rows.
struct BoxSize {
  int columns, rows, images;
};

std::vector<TileInfo> matmul_sm90a_tiles();

// As launch_matmul, for rows at multiples of 16 bytes and, of convolutions, stride 1 without
// enlargement. params.slabs and params.counters are for box_count x channel tiles.
const char* launch_matmul_sm90a(const Params& params, const BoxSize& box, int bits,
                                bool is_convolution, const Tile& tile, void* stream);

}  // namespace ptq4adm
