// The matrix products on the emulator, as a Python module for the tests: the same body, the same
// binding, no GPU.

#include "../bindings/cuda_params.h"
#include "emulated_module.h"
#include "emulator.h"
#include "matmul_variants.h"

namespace py = pybind11;

namespace ptq4adm {
namespace {

template <class Shape, template <int, int> class LoaderOf>
void run(const Params& params, Weight weight) {
  const auto body = [&] {
    if (weight == Weight::kInt8) return matmul_tile<Shape, Weight::kInt8, LoaderOf>(params);
    if (weight == Weight::kInt4) return matmul_tile<Shape, Weight::kInt4, LoaderOf>(params);
    return matmul_tile<Shape, Weight::kInt4Groups, LoaderOf>(params);
  };
  const Tile tile = {Shape::kBlockM, Shape::kBlockN};
  emulator::run_grid({tile_count(params, tile), params.splits, 1}, Shape::kBlockThreads,
                     static_cast<size_t>(Shape::shared_bytes(params.blocks[1] > 0)), body,
                     bindings::emulated_order());
}

}  // namespace

std::vector<TileInfo> matmul_tiles() { return Tiles::infos(); }

const char* launch_matmul(const Params& params, int bits, bool is_convolution, const Tile& tile,
                          void* /*stream*/) {
  return Tiles::with_tile(tile, [&](auto shape) -> const char* {
    using Shape = decltype(shape);
    const Weight weight = weight_of(params, bits);
    is_convolution ? run<Shape, PixelLoader>(params, weight)
                   : run<Shape, RowLoader>(params, weight);
    return nullptr;
  });
}

}  // namespace ptq4adm

PYBIND11_MODULE(matmul_emulated, module) {
  using namespace ptq4adm;
  bindings::bind_emulated(module);
  module.def("matmul_tiles", &matmul_tiles);
  module.def("matmul", [](const Params& params, int bits, bool is_convolution, int block_m,
                          int block_n, int /*device*/, std::uintptr_t /*stream*/) {
    const char* reason = launch_matmul(params, bits, is_convolution, {block_m, block_n}, nullptr);
    if (reason != nullptr) throw std::invalid_argument(reason);
  });

  // the maps of fragments.h, for tests that count bank conflicts and compare layouts
  module.def("tile_offset", &tile_offset);
  module.def("stage_offset", &stage_offset);
  module.def("tile_channel", &tile_channel);
}
