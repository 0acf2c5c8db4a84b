// What there is to know about the GPUs before a kernel is launched, and how a CUDA error becomes an
// exception. No CUDA header is included, so that a plain C++ compiler can read this one.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ptq4adm {

// A CUDA call failed. The text holds CUDA's own words and the error's name.
class CudaError : public std::runtime_error {
 public:
  CudaError(const std::string& text, int code) : std::runtime_error(text), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;  // a cudaError_t
};

// Throws CudaError unless the code (a cudaError_t) is success. `action` says what was tried, such
// as "matmul: launch". A sticky error, after which nothing runs in this process, is reported as
// such.
void check_cuda(int code, const char* action);

// Throws for a launch that failed with a reason: CudaError if CUDA gave it, std::invalid_argument
// if the launcher refused its arguments.
[[noreturn]] void throw_launch_failure(const char* action, const char* reason);

// CUDA's words for an error and whether it is sticky: "invalid argument (cudaErrorInvalidValue)".
std::string error_text(int code);
bool is_sticky(int code);

struct DeviceInfo {
  std::string name;
  int major;
  int minor;
  int multiprocessors;
  int64_t shared_bytes_per_block;  // the most that a block can opt in to
  int64_t shared_bytes_per_multiprocessor;
  int64_t l2_bytes;
  int64_t memory_bytes;
};

int device_count();                  // 0 is an error as well: the text says why there is none
DeviceInfo device_info(int device);  // throws CudaError for a device that does not exist
int driver_version();                // CUDA version that the driver knows, 13000 for 13.0; 0: none
int runtime_version();               // CUDA version of the library in this module

// Whether the build holds code for the device; throws CudaError for any other trouble with it.
bool has_code_for(int device);

// Makes a device the current one and brings the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// Writes probe_value(i) into out[i], i < count, on the device: shows that kernels of this build run
// there, on that stream. Nothing waits; 0 as the stream is CUDA's default stream, because the
// caller said so.
void probe(int device, uint32_t* out, int64_t count, void* stream);
uint32_t probe_value(int64_t index);

}  // namespace ptq4adm
