// Tensor maps by the driver's own function, found at run time: the module does not link libcuda.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#include "tensor_map.h"
#include "tensor_map_rules.h"

namespace ptq4adm {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
                  alignof(TensorMap) >= alignof(CUtensorMap),
              "a TensorMap holds a CUtensorMap");

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, or nullptr.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) {
    cudaGetLastError();  // answered, not left for the next check
    return nullptr;
  }
  return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

const char* make_tensor_map(TensorMap* map, const TensorMapDescription& description) {
  thread_local std::string reason;
  reason = tensor_map_offence(description);
  if (!reason.empty()) {
    reason = "tensor map: " + reason;
    return reason.c_str();
  }
  static const Encode encode = find_encode();
  if (encode == nullptr) {
    return "tensor map: the driver has no cuTensorMapEncodeTiled; "
           "needed: a driver for CUDA 12.0 or newer";
  }
  cuuint64_t sizes[TensorMapDescription::kMaxRank], strides[TensorMapDescription::kMaxRank];
  cuuint32_t box[TensorMapDescription::kMaxRank], steps[TensorMapDescription::kMaxRank];
  for (int i = 0; i < description.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(description.sizes[i]);
    strides[i] = static_cast<cuuint64_t>(description.strides[i]);
    box[i] = static_cast<cuuint32_t>(description.box[i]);
    steps[i] = 1;
  }
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_UINT8, description.rank,
             reinterpret_cast<void*>(description.base), sizes, strides + 1, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return nullptr;
  reason = "tensor map: cuTensorMapEncodeTiled returned CUresult " + std::to_string(result);
  return reason.c_str();
}

}  // namespace ptq4adm
