// What a matrix product is told, as Python sees it: ptq4adm::Params field by field, addresses as
// integers. One description for the module that launches on a GPU and for the emulator's. Types are
// each module's own, so that several may be loaded into one process.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../cuda/matmul.h"

namespace ptq4adm::bindings {

namespace py = pybind11;
using Address = std::uintptr_t;  // 0 is a null pointer, and as a stream CUDA's default stream

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float16") return Dtype::kFloat16;
  if (name == "bfloat16") return Dtype::kBfloat16;
  if (name == "int8") return Dtype::kInt8;
  if (name == "int32") return Dtype::kInt32;
  throw std::invalid_argument("dtype '" + name +
                              "': expected float32, float16, bfloat16, int8 or int32");
}

inline ScaleForm scale_form_of(const std::string& name) {
  if (name == "none") return ScaleForm::kNone;
  if (name == "one") return ScaleForm::kOne;
  if (name == "table") return ScaleForm::kTable;
  if (name == "row") return ScaleForm::kRow;
  throw std::invalid_argument("scale form '" + name + "': expected none, one, table or row");
}

using Pair = std::array<int32_t, 2>;
using Box = std::array<int32_t, 3>;  // columns, rows, images

inline Window window_of(Pair size, Pair enlarged, Pair out_size, int32_t kernel_width, Pair stride,
                        Pair padding, Pair dilation) {
  Window window{};
  window.height = size[0], window.width = size[1];
  window.rows = enlarged[0], window.columns = enlarged[1];
  window.out_height = out_size[0], window.out_width = out_size[1];
  window.kernel_width = kernel_width;
  for (int axis = 0; axis < 2; ++axis) {
    window.stride[axis] = stride[axis];
    window.padding[axis] = padding[axis];
    window.dilation[axis] = dilation[axis];
  }
  if (enlarged == size) {
    window.enlargement = Enlargement::kNone;
  } else if (enlarged[0] == 2 * size[0] && enlarged[1] == 2 * size[1]) {
    window.enlargement = Enlargement::kDouble;
  } else {
    window.enlargement = Enlargement::kAny;
  }
  return window;
}

// An address: integers both ways.
template <typename T>
void bind_address(py::class_<Params>& type, const char* name, T* Params::* field) {
  type.def_property(
      name, [field](const Params& params) { return reinterpret_cast<Address>(params.*field); },
      [field](Params& params, Address address) { params.*field = at<T>(address); });
}

// Two values of an array, one a segment of K.
template <typename T>
void bind_segments(py::class_<Params>& type, const char* name, T (Params::*field)[2]) {
  type.def_property(
      name,
      [field](const Params& params) {
        return std::array<T, 2>{(params.*field)[0], (params.*field)[1]};
      },
      [field](Params& params, const std::array<T, 2>& values) {
        (params.*field)[0] = values[0];
        (params.*field)[1] = values[1];
      });
}

template <typename T>
void bind_addresses(py::class_<Params>& type, const char* name, T* (Params::*field)[2]) {
  type.def_property(
      name,
      [field](const Params& params) {
        return std::array<Address, 2>{reinterpret_cast<Address>((params.*field)[0]),
                                      reinterpret_cast<Address>((params.*field)[1])};
      },
      [field](Params& params, const std::array<Address, 2>& values) {
        (params.*field)[0] = at<T>(values[0]);
        (params.*field)[1] = at<T>(values[1]);
      });
}

inline void bind_params(py::module_& module) {
  using namespace py::literals;
  py::class_<Scale>(module, "Scale", py::module_local(),
                    "float32 at an address: none, one, table or row.")
      .def(py::init([](Address values, const std::string& form, int32_t table_size) {
             return Scale{at<const float>(values), scale_form_of(form), table_size};
           }),
           "values"_a = 0, "form"_a = "none", "table_size"_a = 0);
  py::class_<Term>(module, "Term", py::module_local(),
                   "A float tensor that is added; address 0 for none.")
      .def(py::init([](Address values, const std::string& dtype) {
             return Term{at<const void>(values), dtype_of(dtype)};
           }),
           "values"_a = 0, "dtype"_a = "float32");
  py::class_<Window>(module, "Window", py::module_local(), "Where the pixels of a convolution lie.")
      .def(py::init(&window_of), py::kw_only(), "size"_a, "enlarged"_a, "out_size"_a,
           "kernel_width"_a, "stride"_a, "padding"_a, "dilation"_a);

  py::class_<Params> type(module, "Params", py::module_local(),
                          "One product; every field begins as zero.");
  type.def(py::init([] { return Params{}; }));
  bind_addresses(type, "x", &Params::x);
  bind_address(type, "qweight", &Params::qweight);
  bind_address(type, "w_mult", &Params::w_mult);
  type.def_readwrite("M", &Params::M).def_readwrite("N", &Params::N);
  bind_segments(type, "channels", &Params::channels);
  bind_segments(type, "blocks", &Params::blocks);
  type.def_readwrite("is_x_aligned", &Params::is_x_aligned);
  type.def_readwrite("window", &Params::window);
  type.def_readwrite("splits", &Params::splits);
  type.def_readwrite("first_splits", &Params::first_splits);
  bind_address(type, "slabs", &Params::slabs);
  bind_address(type, "counters", &Params::counters);
  bind_segments(type, "x_scale", &Params::x_scale);
  bind_address(type, "w_scale", &Params::w_scale);
  bind_address(type, "step", &Params::step);
  type.def_readwrite("bias", &Params::bias);
  type.def_readwrite("temb", &Params::temb);
  type.def_readwrite("residual", &Params::residual);
  type.def_readwrite("rows_per_sample", &Params::rows_per_sample);
  type.def_readwrite("is_gated", &Params::is_gated);
  type.def_readwrite("out_scale", &Params::out_scale);
  bind_addresses(type, "out", &Params::out);
  type.def_property("out_dtype", nullptr, [](Params& params, const std::string& name) {
    params.out_dtype = dtype_of(name);
  });
  type.def_readwrite("is_wide", &Params::is_wide);
}

inline void bind_tiles(py::module_& module) {
  py::class_<TileInfo>(module, "TileInfo", py::module_local(),
                       "A tile that the kernels take, and what it costs.")
      .def_property_readonly("block_m", [](const TileInfo& info) { return info.tile.block_m; })
      .def_property_readonly("block_n", [](const TileInfo& info) { return info.tile.block_n; })
      .def_readonly("warps", &TileInfo::warps)
      .def_readonly("stages", &TileInfo::stages)
      .def_property_readonly(
          "shared_bytes",
          [](const TileInfo& info) {
            return std::array<int, 2>{info.shared_bytes[0], info.shared_bytes[1]};
          },
          "Of a block: with one segment of K, with two.");
}

}  // namespace ptq4adm::bindings
