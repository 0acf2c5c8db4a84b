// The matrix products of matmul_tile.h as kernels for compute capability 8.0 and above.

#include <cuda_runtime_api.h>

#include "matmul_variants.h"

namespace ptq4adm {
namespace {

// Two blocks of 8 warps, or four of 4, on a multiprocessor: 128 registers a thread, of which 64 x 32
// sums a warp are 64. Four rows of pixels a thread beside them take a few more: three blocks.
template <class Shape, template <int, int> class LoaderOf>
constexpr int kBlocks = 512 / Shape::kThreads;
template <>
constexpr int kBlocks<Tile128x64, PixelLoader> = 3;

template <class Shape, Weight kWeight, template <int, int> class LoaderOf>
__global__ void __launch_bounds__(Shape::kThreads, kBlocks<Shape, LoaderOf>)
    matmul_kernel(const __grid_constant__ Params params) {
  matmul_tile<Shape, kWeight, LoaderOf>(params);
}

using Kernel = void (*)(Params);

template <class Shape, template <int, int> class LoaderOf>
Kernel kernel_of(Weight weight) {
  if (weight == Weight::kInt8) return matmul_kernel<Shape, Weight::kInt8, LoaderOf>;
  if (weight == Weight::kInt4Groups) return matmul_kernel<Shape, Weight::kInt4Groups, LoaderOf>;
  return matmul_kernel<Shape, Weight::kInt4, LoaderOf>;
}

cudaError_t launch(Kernel kernel, const Params& params, const TileInfo& info, int shared_bytes,
                   cudaStream_t stream) {
  const dim3 grid(tile_count(params, info.tile), params.splits);
  // above what a block has without asking; cheap, and right for whatever device is current
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        shared_bytes);
    if (error != cudaSuccess) return error;
  }
  Params copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(info.warps * kLanes),
                          arguments, shared_bytes, stream);
}

}  // namespace

std::vector<TileInfo> matmul_tiles() { return all_tiles(); }

const char* launch_matmul(const Params& params, int bits, bool is_convolution, const Tile& tile,
                          void* stream) {
  const char* reason = "no kernel has a tile of this size: see matmul_tiles";
  for_each_tile([&](auto shape) {
    using Shape = decltype(shape);
    if (Shape::kBlockM != tile.block_m || Shape::kBlockN != tile.block_n) return;
    const Weight weight = weight_of(params, bits);
    const Kernel kernel = is_convolution ? kernel_of<Shape, PixelLoader>(weight)
                                         : kernel_of<Shape, RowLoader>(weight);
    const int shared_bytes = Shape::shared_bytes(params.blocks[1] > 0);
    const cudaError_t error = launch(kernel, params, tile_info<Shape>(), shared_bytes,
                                     static_cast<cudaStream_t>(stream));
    reason = error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  });
  return reason;
}

}  // namespace ptq4adm
