// The variants of matmul_tile.h that are compiled, as a list for the GPU and for the emulator.

#pragma once

#include "matmul.h"
#include "matmul_tile.h"

namespace ptq4adm {

// Warps are 64 rows by 32 channels where the tile allows: the more rows a warp has, the more often
// each decoded weight is used; the more channels, the more often each row from shared memory.
using Tile128x128 = TileShape<128, 128, 2, 4, 4>;
using Tile128x64 = TileShape<128, 64, 2, 2, 4>;
using Tile64x64 = TileShape<64, 64, 2, 2, 4>;
using Tile64x32 = TileShape<64, 32, 2, 2, 4>;

// Call f with a value of each tile's type, in order.
template <class Function>
void for_each_tile(Function f) {
  f(Tile128x128());
  f(Tile128x64());
  f(Tile64x64());
  f(Tile64x32());
}

template <class Shape>
TileInfo tile_info() {
  return {{Shape::kBlockM, Shape::kBlockN},
          Shape::kWarpsM * Shape::kWarpsN,
          Shape::kStages,
          {Shape::shared_bytes(false), Shape::shared_bytes(true)}};
}

inline std::vector<TileInfo> all_tiles() {
  std::vector<TileInfo> tiles;
  for_each_tile([&](auto shape) { tiles.push_back(tile_info<decltype(shape)>()); });
  return tiles;
}

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
