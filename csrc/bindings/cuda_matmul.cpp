// The matrix products of ptq4adm._cuda.

#include <pybind11/pybind11.h>

#include "../cuda/device_info.h"
#include "cuda_params.h"

using namespace pybind11::literals;
using namespace ptq4adm::bindings;

namespace {

void bind_sm90a(pybind11::module_& module) {
#ifdef PTQ4ADM_HAS_SM90A
  module.def("matmul_sm90a_tiles", &ptq4adm::matmul_sm90a_tiles,
             "Every tile of the family sm90a, the largest first; none in a build without it.");
  module.def(
      "matmul_sm90a",
      [](const ptq4adm::Params& params, Box box, int bits, bool is_convolution, int block_m,
         int block_n, int device, Address stream) {
        if (bits != 4 && bits != 8) throw std::invalid_argument("matmul: bits must be 4 or 8");
        const ptq4adm::DeviceGuard guard(device);
        const char* reason =
            ptq4adm::launch_matmul_sm90a(params, {box[0], box[1], box[2]}, bits, is_convolution,
                                         {block_m, block_n}, at<void>(stream));
        if (reason != nullptr) ptq4adm::throw_launch_failure("matmul", reason);
      },
      "As matmul, of the family sm90a; after params, the box of a tile: columns, rows, images.");
#else
  module.def(
      "matmul_sm90a_tiles", [] { return std::vector<ptq4adm::TileInfo>(); },
      "None: this build holds no code for 9.0a.");
#endif
}

}  // namespace

void bind_cuda_matmul(pybind11::module_& module) {
  bind_sm90a(module);
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
