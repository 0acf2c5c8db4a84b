// The matrix products of ptq4adm._cuda.

#include <pybind11/pybind11.h>

#include "../cuda/device_info.h"
#include "cuda_params.h"

using namespace pybind11::literals;
using namespace ptq4adm::bindings;

void bind_cuda_matmul(pybind11::module_& module) {
  bind_params(module);
  bind_tiles(module);
  module.def("matmul_tiles", &ptq4adm::matmul_tiles, "Every tile, the largest first.");
  // by position: keywords would cost more than the launch
  module.def(
      "matmul",
      [](const ptq4adm::Params& params, int bits, bool is_convolution, int block_m, int block_n,
         int device, Address stream) {
        if (bits != 4 && bits != 8) throw std::invalid_argument("matmul: bits must be 4 or 8");
        const ptq4adm::DeviceGuard guard(device);
        const char* reason = ptq4adm::launch_matmul(params, bits, is_convolution,
                                                    {block_m, block_n}, at<void>(stream));
        if (reason != nullptr) ptq4adm::throw_launch_failure("matmul", reason);
      },
      "Start a product on a stream of a device: params, bits (4 or 8), is_convolution, block_m, "
      "block_n, device, stream.");
}
