// The variants of matmul_tile.h that are compiled, as a list for the GPU and for the emulator.

#pragma once

#include "matmul_tile.h"
#include "tile_list.h"

namespace ptq4adm {

// Warps are 64 rows by 32 channels where the tile allows: the more rows a warp has, the more often
// each decoded weight is used; the more channels, the more often each row from shared memory.
using Tile128x128 = TileShape<128, 128, 2, 4, 4>;
using Tile128x64 = TileShape<128, 64, 2, 2, 4>;
using Tile64x64 = TileShape<64, 64, 2, 2, 4>;
using Tile64x32 = TileShape<64, 32, 2, 2, 4>;

// the largest first
using Tiles = TileList<Tile128x128, Tile128x64, Tile64x64, Tile64x32>;

// Tiles of a product: the first size of the grid; the second is params.splits.
inline int tile_count(const Params& params, const Tile& tile) {
  return (params.M + tile.block_m - 1) / tile.block_m *
         ((params.N + tile.block_n - 1) / tile.block_n);
}

inline Weight weight_of(const Params& params, int bits) {
  if (bits == 8) return Weight::kInt8;
  return params.w_mult == nullptr ? Weight::kInt4 : Weight::kInt4Groups;
}

}  // namespace ptq4adm
