// The matrix products of matmul_tile.h as kernels for compute capability 8.0 and above.

#include <cuda_runtime_api.h>

#include "matmul_variants.h"

namespace ptq4adm {
namespace {

// Shared memory of a multiprocessor, of which every block takes 1 KiB besides its own.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr int kSharedBytes = 100 * 1024;
#else
constexpr int kSharedBytes = 164 * 1024;
#endif

// Blocks that should fit on a multiprocessor together: they set how many registers a thread may
// have. 128 are enough for two blocks of 8 warps, or four of 4, with 64 x 32 sums a warp; the four
// rows a thread of 128 x 64 take a few more. Where shared memory admits fewer blocks, registers
// need not be saved.
template <class Shape>
constexpr int blocks_together() {
  constexpr int by_registers = Shape::kLoaderRows == 4 ? 3 : 512 / Shape::kThreads;
  constexpr int by_memory = kSharedBytes / (Shape::shared_bytes(false) + 1024);
  return by_memory < by_registers ? by_memory : by_registers;
}

template <class Shape, Weight kWeight, template <int, int> class LoaderOf>
__global__ void __launch_bounds__(Shape::kThreads, blocks_together<Shape>())
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

cudaError_t launch(Kernel kernel, const Params& params, const Tile& tile, int threads,
                   int shared_bytes, cudaStream_t stream) {
  const dim3 grid(tile_count(params, tile), params.splits);
  // above what a block has without asking; cheap, and right for whatever device is current
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  Params copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), arguments,
                          shared_bytes, stream);
}

}  // namespace

std::vector<TileInfo> matmul_tiles() { return Tiles::infos(); }

const char* launch_matmul(const Params& params, int bits, bool is_convolution, const Tile& tile,
                          void* stream) {
  return Tiles::with_tile(tile, [&](auto shape) -> const char* {
    using Shape = decltype(shape);
    const Weight weight = weight_of(params, bits);
    const Kernel kernel = is_convolution ? kernel_of<Shape, PixelLoader>(weight)
                                         : kernel_of<Shape, RowLoader>(weight);
    const int shared_bytes = Shape::shared_bytes(params.blocks[1] > 0);
    const cudaError_t error = launch(kernel, params, tile, Shape::kBlockThreads, shared_bytes,
                                     static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  });
}

}  // namespace ptq4adm
