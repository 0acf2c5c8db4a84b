// The matrix products of matmul_sm90.h on the emulator, as a Python module for the tests: the same
// body, the same binding, no GPU.

#include "emulated_module.h"
#include "matmul_sm90_variants.h"
#include "matmul_variants.h"

namespace ptq4adm {

std::vector<TileInfo> matmul_sm90a_tiles() { return TilesSm90::infos(); }

const char* launch_matmul_sm90a(const Params& params, const BoxSize& box, int bits,
                                bool is_convolution, const Tile& tile, void* /*stream*/) {
  const Weight weight = weight_of(params, bits);
  const auto run = [&](auto shape, const ParamsSm90& all) -> const char* {
    using Shape = decltype(shape);
    const auto body = [&] {
      if (weight == Weight::kInt8) return matmul_warpgroup_tile<Shape, Weight::kInt8>(all);
      if (weight == Weight::kInt4) return matmul_warpgroup_tile<Shape, Weight::kInt4>(all);
      return matmul_warpgroup_tile<Shape, Weight::kInt4Groups>(all);
    };
    emulator::run_grid({tile_count_sm90<Shape>(all), params.splits, 1}, Shape::kBlockThreads,
                       static_cast<size_t>(Shape::shared_bytes(params.blocks[1] > 0)), body,
                       bindings::emulated_order());
    return nullptr;
  };
  return with_tile_sm90(params, box, is_convolution, tile, run);
}

}  // namespace ptq4adm

PYBIND11_MODULE(matmul_sm90_emulated, module) {
  using namespace ptq4adm;
  bindings::bind_emulated(module);
  module.def("matmul_sm90a_tiles", &matmul_sm90a_tiles);
  module.def(
      "matmul_sm90a", [](const Params& params, bindings::Box box, int bits, bool is_convolution,
                         int block_m, int block_n, int /*device*/, bindings::Address /*stream*/) {
        const char* reason = launch_matmul_sm90a(params, {box[0], box[1], box[2]}, bits,
                                                 is_convolution, {block_m, block_n}, nullptr);
        if (reason != nullptr) throw std::invalid_argument(reason);
      });

  // maps, for tests that count bank conflicts and pixels
  module.def("stage_offset", &stage_offset);
  module.def(
      "box_rows",
      [](bindings::Box size, bindings::Box extent, int tile_rows) {
        const Boxes boxes = {size[0], size[1], size[2], extent[0], extent[1], extent[2], true};
        std::vector<std::vector<int>> rows(box_count(boxes));
        for (int box = 0; box < box_count(boxes); ++box) {
          const BoxPlace place = box_place(boxes, box);
          for (int row = 0; row < tile_rows; ++row) rows[box].push_back(box_row(boxes, place, row));
        }
        return rows;
      },
      "Of every box, the row of the product of every row of a tile, -1 for none.");
}
