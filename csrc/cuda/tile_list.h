// The tiles of a family, as a list of types: what they cost, and the one of a size.

#pragma once

#include <vector>

#include "fragments.h"
#include "matmul.h"

namespace ptq4adm {

template <class... Shapes>
struct TileList {
  static std::vector<TileInfo> infos() {
    return {TileInfo{{Shapes::kBlockM, Shapes::kBlockN},
                     Shapes::kBlockThreads / kLanes,
                     Shapes::kStages,
                     {Shapes::shared_bytes(false), Shapes::shared_bytes(true)}}...};
  }

  // Call f with a value of the type of a size. Returns what f returns, or that there is none.
  template <class Function>
  static const char* with_tile(const Tile& tile, Function f) {
    const char* reason = "no kernel has a tile of this size: see matmul_tiles, matmul_sm90a_tiles";
    const auto try_shape = [&](auto shape) {
      using Shape = decltype(shape);
      if (Shape::kBlockM == tile.block_m && Shape::kBlockN == tile.block_n) reason = f(shape);
    };
    (try_shape(Shapes()), ...);
    return reason;
  }
};

}  // namespace ptq4adm
