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

}  // namespace ptq4adm
