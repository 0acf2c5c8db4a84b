#include <cuda_runtime.h>

#include "device_info.h"

namespace ptq4adm {
namespace {

constexpr int kThreads = 256;

// a multiplicative hash: neither zeros nor poison look like it
__host__ __device__ inline uint32_t hash(int64_t index) {
  return static_cast<uint32_t>(index) * 2654435761u + 1u;
}

__global__ void probe_kernel(uint32_t* out, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < count) out[index] = hash(index);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

std::string error_text(int code) {
  const auto error = static_cast<cudaError_t>(code);
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

bool is_sticky(int code) {
  switch (static_cast<cudaError_t>(code)) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorExternalDevice:
      return true;
    default:
      return false;
  }
}

void check_cuda(int code, const char* action) {
  if (code == cudaSuccess) return;
  // a failed call also stays the runtime's last error, where a later check would find it
  cudaGetLastError();
  std::string text = std::string(action) + ": " + error_text(code);
  if (is_sticky(code)) {
    text +=
        "; an earlier kernel broke this process's CUDA context and nothing runs on the GPU any ";
    text += "more: start Python again, with CUDA_LAUNCH_BLOCKING=1 to learn which kernel it was";
  }
  throw CudaError(text, code);
}

void throw_launch_failure(const char* action, const char* reason) {
  check_cuda(cudaPeekAtLastError(), action);
  throw std::invalid_argument(std::string(action) + ": " + reason);
}

int device_count() {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  if (count == 0) check_cuda(cudaErrorNoDevice, "cudaGetDeviceCount");
  return count;
}

DeviceInfo device_info(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  DeviceInfo info;
  info.name = properties.name;
  info.major = properties.major;
  info.minor = properties.minor;
  info.multiprocessors = properties.multiProcessorCount;
  info.shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  info.shared_bytes_per_multiprocessor =
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  info.l2_bytes = properties.l2CacheSize;
  info.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  return info;
}

int driver_version() {
  int version = 0;
  check_cuda(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

int runtime_version() {
  int version = 0;
  check_cuda(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

bool has_code_for(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();  // answered, not left for the next check
    return false;
  }
  check_cuda(error, "cudaFuncGetAttributes");
  return true;
}

DeviceGuard::DeviceGuard(int device) {
  check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
}

// nothing can be done about an error here, and the next call reports it again
DeviceGuard::~DeviceGuard() { cudaSetDevice(previous_); }

void probe(int device, uint32_t* out, int64_t count, void* stream) {
  if (count < 0) throw std::invalid_argument("probe: count must not be negative");
  if (count == 0) return;
  const DeviceGuard guard(device);
  void* arguments[] = {&out, &count};
  const dim3 blocks(static_cast<unsigned>((count + kThreads - 1) / kThreads));
  // unlike <<< >>>, it returns the error of this launch and of no other
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(probe_kernel), blocks, dim3(kThreads),
                              arguments, 0, static_cast<cudaStream_t>(stream)),
             "probe: launch");
}

uint32_t probe_value(int64_t index) { return hash(index); }

}  // namespace ptq4adm
