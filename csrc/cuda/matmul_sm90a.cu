// The matrix products of matmul_sm90.h as kernels for compute capability 9.0a.

#include <cuda_runtime_api.h>

#include "matmul_sm90_variants.h"
#include "matmul_variants.h"

namespace ptq4adm {
namespace {

// The tensor maps stay in the parameters' memory, where the copies find them: a CUDA graph keeps
// them with the launch.
template <class Shape, Weight kWeight>
__global__ void __launch_bounds__(Shape::kBlockThreads, Shape::kBlocks)
    matmul_sm90a_kernel(const __grid_constant__ ParamsSm90 all) {
  matmul_warpgroup_tile<Shape, kWeight>(all);
}

using Kernel = void (*)(ParamsSm90);

template <class Shape>
Kernel kernel_of(Weight weight) {
  if (weight == Weight::kInt8) return matmul_sm90a_kernel<Shape, Weight::kInt8>;
  if (weight == Weight::kInt4Groups) return matmul_sm90a_kernel<Shape, Weight::kInt4Groups>;
  return matmul_sm90a_kernel<Shape, Weight::kInt4>;
}

}  // namespace

std::vector<TileInfo> matmul_sm90a_tiles() { return TilesSm90::infos(); }

const char* launch_matmul_sm90a(const Params& params, const BoxSize& box, int bits,
                                bool is_convolution, const Tile& tile, void* stream) {
  const auto launch = [&](auto shape, ParamsSm90& all) -> const char* {
    using Shape = decltype(shape);
    const void* kernel = reinterpret_cast<const void*>(kernel_of<Shape>(weight_of(params, bits)));
    const int shared_bytes = Shape::shared_bytes(params.blocks[1] > 0);
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaSuccess) {
      void* arguments[] = {&all};
      error = cudaLaunchKernel(kernel, dim3(tile_count_sm90<Shape>(all), params.splits),
                               dim3(Shape::kBlockThreads), arguments, shared_bytes,
                               static_cast<cudaStream_t>(stream));
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  };
  return with_tile_sm90(params, box, is_convolution, tile, launch);
}

}  // namespace ptq4adm
