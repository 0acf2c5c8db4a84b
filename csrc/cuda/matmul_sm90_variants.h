// The variants of matmul_sm90.h that are compiled, and what the host has to make for them, for the
// GPU and for the emulator.

#pragma once

#include "matmul_sm90.h"
#include "tile_list.h"

namespace ptq4adm {

// rows, 64s of channels a warpgroup, warpgroups, stages, blocks on a multiprocessor: 128 sums a
// thread where the product is large, because what a block reads for a product falls with its size;
// docs/kernels-cuda.md counts registers and shared memory.
using Tile128x256Sm90 = WarpgroupTile<128, 2, 2, 8, 1>;
using Tile256x128Sm90 = WarpgroupTile<256, 1, 2, 6, 1>;
using Tile128x128Sm90 = WarpgroupTile<128, 2, 1, 6, 2>;
using Tile128x64Sm90 = WarpgroupTile<128, 1, 1, 6, 3>;
using Tile64x64Sm90 = WarpgroupTile<64, 1, 1, 8, 4>;

// the largest first
using TilesSm90 =
    TileList<Tile128x256Sm90, Tile256x128Sm90, Tile128x128Sm90, Tile128x64Sm90, Tile64x64Sm90>;

// Tiles of a product: the first size of the grid; the second is params.splits.
template <class Shape>
int tile_count_sm90(const ParamsSm90& all) {
  return box_count(all.boxes) * ((all.params.N + Shape::kBlockN - 1) / Shape::kBlockN);
}

// The kernel's parameters: what the product is told, boxes, and a tensor map of each segment.
// Returns the reason if a map cannot be made.
inline const char* make_params_sm90(ParamsSm90* all, const Params& params, const BoxSize& box,
                                    bool is_convolution) {
  const Window& window = params.window;
  all->params = params;
  all->boxes = {box.columns, box.rows, box.images, params.M, 1, 1, is_convolution};
  if (is_convolution) {
    all->boxes.width = window.out_width;
    all->boxes.height = window.out_height;
    all->boxes.count = params.M / (window.out_width * window.out_height);
  }
  for (int segment = 0; segment < 2; ++segment) {
    if (params.blocks[segment] == 0) continue;
    const int64_t channels = params.channels[segment];
    TensorMap* map = &all->x_map[segment];
    const char* reason = nullptr;
    if (is_convolution) {
      const int64_t line = channels * window.width;
      reason = make_tensor_map_4d(
          map, params.x[segment], {channels, window.width, window.height, all->boxes.count},
          {channels, line, line * window.height}, {kBlockK, box.columns, box.rows, box.images});
    } else {
      reason = make_tensor_map_2d(map, params.x[segment], {channels, params.M}, {channels},
                                  {kBlockK, box.columns});
    }
    if (reason != nullptr) return reason;
  }
  return nullptr;
}

// Run `f(shape, all)` for the variant of a size; null, or the reason why there is none.
template <class Function>
const char* with_tile_sm90(const Params& params, const BoxSize& box, bool is_convolution,
                           const Tile& tile, Function f) {
  if (box.columns < 1 || box.rows < 1 || box.images < 1 ||
      int64_t{box.columns} * box.rows * box.images > tile.block_m) {
    return "a box does not fit the tile's rows";
  }
  return TilesSm90::with_tile(tile, [&](auto shape) -> const char* {
    ParamsSm90 all{};
    const char* reason = make_params_sm90(&all, params, box, is_convolution);
    return reason == nullptr ? f(shape, all) : reason;
  });
}

}  // namespace ptq4adm
