// ptq4adm._cpu: addresses in, errors out. Python checks the tensors; here are only casts.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "../cpu/matmul.h"
#include "../cpu/parallel.h"
#include "activation.h"
#include "attention.h"

namespace py = pybind11;
using namespace py::literals;

void bind_roofline(py::module_& module);  // roofline.cpp

namespace {

using Address = std::uintptr_t;  // 0 is a null pointer

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

ptq4adm::Output output_kind(const std::string& dtype) {
  if (dtype == "float32") return ptq4adm::Output::kFloat32;
  if (dtype == "int8") return ptq4adm::Output::kInt8;
  if (dtype == "int32") return ptq4adm::Output::kInt32;
  throw std::invalid_argument("out_dtype '" + dtype + "': expected float32, int8 or int32");
}

bool matmul(const ptq4adm::Conv2dShape& shape, int bits, Address x_q, Address x2_q, Address qweight,
            Address w_mult, Address w_scale, Address x_scale, bool is_x_scale_per_row,
            Address x2_scale, bool is_x2_scale_per_row, Address bias, Address temb,
            int64_t temb_rows, Address residual, bool is_geglu, Address out_scale, Address out,
            Address out2, const std::string& out_dtype, const std::string& isa, int64_t threads) {
  ptq4adm::MatmulCall call{};
  call.bits = bits;
  call.x_q[0] = at<const int8_t>(x_q);
  call.x_q[1] = at<const int8_t>(x2_q);
  call.qweight = at<const void>(qweight);
  call.w_mult = at<const uint8_t>(w_mult);
  call.w_scale = at<const float>(w_scale);
  call.x_scale[0] = at<const float>(x_scale);
  call.x_scale[1] = at<const float>(x2_scale);
  call.is_x_scale_per_row[0] = is_x_scale_per_row;
  call.is_x_scale_per_row[1] = is_x2_scale_per_row;
  call.bias = at<const float>(bias);
  call.temb = at<const float>(temb);
  call.temb_rows = temb_rows;
  call.residual = at<const float>(residual);
  call.is_geglu = is_geglu;
  call.out_scale = at<const float>(out_scale);
  call.out[0] = at<void>(out);
  call.out[1] = at<void>(out2);
  call.output = output_kind(out_dtype);
  const ptq4adm::Kernels& kernels = ptq4adm::select_kernels(isa.c_str());
  const ptq4adm::ActivationKernels& activations = ptq4adm::select_activation_kernels(isa.c_str());
  const py::gil_scoped_release release;
  return ptq4adm::matmul(kernels, activations, shape, call, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Compiled CPU kernels of ptq4adm; ptq4adm.ops.cpu checks what it passes here.";

  py::class_<ptq4adm::Conv2dShape>(module, "Conv2dShape", "Sizes of one layer.")
      .def(py::init<std::array<int64_t, 3>, ptq4adm::Pair, int64_t, ptq4adm::Pair, ptq4adm::Pair,
                    ptq4adm::Pair, ptq4adm::Pair, ptq4adm::Pair, ptq4adm::Pair>(),
           py::kw_only(), "size"_a, "channels"_a, "out_channels"_a, "kernel_size"_a, "stride"_a,
           "padding"_a, "dilation"_a, "upsample"_a, "out_size"_a);

  // by position: keywords would cost more than small products
  module.def("matmul", &matmul, "Matrix product; False if an int8 output met NaN or infinity.");
  bind_activations(module);
  bind_attention(module);
  module.def(
      "best_isa", [] { return ptq4adm::select_kernels("auto").name; },
      "Instruction set that this processor runs.");
  module.def(
      "check_isa", [](const std::string& isa) { ptq4adm::select_kernels(isa.c_str()); },
      "Raises unless this processor runs the instruction set.", "isa"_a);
  module.def("is_compiled", &ptq4adm::is_compiled, "Whether this build holds an instruction set.",
             "isa"_a);
  module.def("set_auto_isa", &ptq4adm::set_auto_isa,
             "What isa='auto' means from now on: 'auto', or an instruction set.", "isa"_a);
  module.def("threading", &ptq4adm::threading, "OpenMP or std::thread.");
  bind_roofline(module);
}
