// From Python's view of a matrix product to Params: the same for the GPU and for the emulator.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "../cuda/matmul.h"

namespace ptq4adm {

// Reads the fields that ptq4adm/ops/cuda_matmul.py writes; a missing one is an error of that file.
class ParamsReader {
 public:
  explicit ParamsReader(const pybind11::dict& fields) : fields_(fields) {}

  Params read() const {
    Params params{};
    for (int segment = 0; segment < 2; ++segment) {
      const std::string suffix = segment == 0 ? "" : "2";
      params.x[segment] = at<const int8_t>("x" + suffix);
      params.channels[segment] = number("channels" + suffix);
      params.blocks[segment] = number("blocks" + suffix);
      params.x_scale[segment] = scale("x" + suffix + "_scale");
      params.out[segment] = at<void>("out" + suffix);
    }
    params.qweight = at<const void>("qweight");
    params.w_mult = at<const uint8_t>("w_mult");
    params.M = number("M");
    params.N = number("N");
    params.is_x_aligned = number("is_x_aligned") != 0;
    params.window = window();
    params.splits = number("splits");
    params.first_splits = number("first_splits");
    params.slabs = at<int32_t>("slabs");
    params.counters = at<int32_t>("counters");
    params.w_scale = at<const float>("w_scale");
    params.step = at<const int64_t>("step");
    params.bias = term("bias");
    params.temb = term("temb");
    params.residual = term("residual");
    params.rows_per_sample = number("rows_per_sample");
    params.is_gated = number("is_gated") != 0;
    params.out_scale = scale("out_scale");
    params.out_dtype = static_cast<Dtype>(number("out_dtype"));
    params.is_wide = number("is_wide") != 0;
    return params;
  }

 private:
  int32_t number(const std::string& name) const {
    return pybind11::cast<int32_t>(fields_[name.c_str()]);
  }
  template <class T>
  T* at(const std::string& name) const {
    return reinterpret_cast<T*>(pybind11::cast<std::uintptr_t>(fields_[name.c_str()]));
  }
  Scale scale(const std::string& name) const {
    return {at<const float>(name), static_cast<ScaleForm>(number(name + "_form")),
            number(name + "_table")};
  }
  Term term(const std::string& name) const {
    return {at<const void>(name), static_cast<Dtype>(number(name + "_dtype"))};
  }
  Window window() const {
    Window window{};
    window.height = number("height");
    window.width = number("width");
    window.rows = number("upsampled_height");
    window.columns = number("upsampled_width");
    window.out_height = number("out_height");
    window.out_width = number("out_width");
    window.kernel_width = number("kernel_width");
    const char* axes[] = {"_rows", "_columns"};
    for (int axis = 0; axis < 2; ++axis) {
      window.stride[axis] = number(std::string("stride") + axes[axis]);
      window.padding[axis] = number(std::string("padding") + axes[axis]);
      window.dilation[axis] = number(std::string("dilation") + axes[axis]);
    }
    window.enlargement = static_cast<Enlargement>(number("enlargement"));
    return window;
  }

  const pybind11::dict& fields_;
};

// matmul(fields, bits, is_convolution, (block_m, block_n), stream), raising RuntimeError with what
// is wrong; matmul_tiles(), as tuples (block_m, block_n, warps, stages, shared, shared of two).
inline void bind_matmul(pybind11::module_& module) {
  module.def("matmul", [](const pybind11::dict& fields, int bits, bool is_convolution,
                          std::pair<int, int> tile, std::uintptr_t stream) {
    const Params params = ParamsReader(fields).read();
    const char* reason = launch_matmul(params, bits, is_convolution, {tile.first, tile.second},
                                       reinterpret_cast<void*>(stream));
    if (reason != nullptr) throw std::runtime_error(reason);
  });
  module.def("matmul_tiles", [] {
    pybind11::list tiles;
    for (const TileInfo& info : matmul_tiles()) {
      tiles.append(pybind11::make_tuple(info.tile.block_m, info.tile.block_n, info.warps,
                                        info.stages, info.shared_bytes[0], info.shared_bytes[1]));
    }
    return tiles;
  });
}

}  // namespace ptq4adm
