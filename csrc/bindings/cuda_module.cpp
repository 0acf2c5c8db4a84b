// ptq4adm._cuda: addresses and a stream in, errors out. Python checks the tensors; here are only
// casts. No function waits for the device, and none launches on a stream that it was not given.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../cuda/device_info.h"

namespace py = pybind11;
using namespace py::literals;

void bind_cuda_matmul(py::module_& module);  // cuda_matmul.cpp

namespace {

using Address = std::uintptr_t;  // 0 is a null pointer, and as a stream CUDA's default stream

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_devices(py::module_& module) {
  using ptq4adm::DeviceInfo;
  py::register_exception<ptq4adm::CudaError>(module, "CudaError", PyExc_RuntimeError);
  py::class_<DeviceInfo>(module, "DeviceInfo", "What a GPU is and has.")
      .def_readonly("name", &DeviceInfo::name)
      .def_readonly("major", &DeviceInfo::major)
      .def_readonly("minor", &DeviceInfo::minor)
      .def_readonly("multiprocessors", &DeviceInfo::multiprocessors)
      .def_readonly("shared_bytes_per_block", &DeviceInfo::shared_bytes_per_block)
      .def_readonly("shared_bytes_per_multiprocessor", &DeviceInfo::shared_bytes_per_multiprocessor)
      .def_readonly("l2_bytes", &DeviceInfo::l2_bytes)
      .def_readonly("memory_bytes", &DeviceInfo::memory_bytes);
  module.def(
      "archs", [] { return std::string(PTQ4ADM_CUDA_ARCHS); },
      "Architectures that this build holds machine code for, such as '80;89;90a'.");
  module.def("device_count", &ptq4adm::device_count,
             "GPUs here; CudaError with CUDA's reason if there is none.");
  module.def("device_info", &ptq4adm::device_info, "A GPU's properties.", "device"_a);
  module.def("driver_version", &ptq4adm::driver_version,
             "13000 for CUDA 13.0; 0 without a driver.");
  module.def("runtime_version", &ptq4adm::runtime_version, "13000 for CUDA 13.0.");
  module.def("has_code_for", &ptq4adm::has_code_for, "Whether this build runs on a GPU.",
             "device"_a);
  module.def("error_text", &ptq4adm::error_text, "CUDA's words for an error code.", "code"_a);
  module.def("is_sticky", &ptq4adm::is_sticky,
             "Whether nothing runs in a process after this error.", "code"_a);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Compiled CUDA kernels of ptq4adm; ptq4adm.ops checks what it passes here.";
  bind_devices(module);
  bind_cuda_matmul(module);
  module.def(
      "probe",
      [](int device, Address out, int64_t count, Address stream) {
        ptq4adm::probe(device, at<uint32_t>(out), count, at<void>(stream));
      },
      "Fill count uint32 at an address of a GPU with known numbers, on a stream.", "device"_a,
      "out"_a, "count"_a, "stream"_a);
  module.def("probe_value", &ptq4adm::probe_value, "What probe writes at an index.", "index"_a);
}
