// The functions over activations: addresses in, a status out. Python checks the tensors.
//
// Arguments are positional: a small model makes hundreds of these calls a step, and keywords would
// double what a call costs.

#include "../cpu/activation.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "activation.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;  // 0 is a null pointer

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

ptq4adm::QuantizedOutput output(Address table, int64_t table_size, Address step, Address scale,
                                Address x_q) {
  return {at<const float>(table), table_size, at<const int64_t>(step), at<float>(scale),
          at<int8_t>(x_q)};
}

int quantize_int8(Address x, int64_t rows, int64_t columns, int64_t row_stride, bool is_per_row,
                  Address table, int64_t table_size, Address step, Address scale, Address x_q,
                  const char* isa, int64_t threads) {
  const ptq4adm::ActivationKernels& kernels = ptq4adm::select_activation_kernels(isa);
  const py::gil_scoped_release release;
  return static_cast<int>(
      ptq4adm::quantize_int8(kernels, {at<const float>(x), rows, columns, row_stride}, is_per_row,
                             output(table, table_size, step, scale, x_q), threads));
}

int groupnorm_silu_quantize(Address x, int64_t batch, int64_t pixels, int64_t channels,
                            int64_t batch_stride, int64_t pixel_stride, int64_t groups,
                            Address weight, Address bias, double eps, bool is_silu, Address table,
                            int64_t table_size, Address step, Address scale, Address x_q,
                            const char* isa, int64_t threads) {
  const ptq4adm::ActivationKernels& kernels = ptq4adm::select_activation_kernels(isa);
  const ptq4adm::GroupNorm norm{
      at<const float>(x),    batch,        pixels, channels,
      batch_stride,          pixel_stride, groups, at<const float>(weight),
      at<const float>(bias), eps,          is_silu};
  const py::gil_scoped_release release;
  return static_cast<int>(ptq4adm::groupnorm_silu_quantize(
      kernels, norm, output(table, table_size, step, scale, x_q), threads));
}

int layernorm_quantize(Address x, int64_t rows, int64_t columns, int64_t row_stride, Address weight,
                       Address bias, double eps, Address table, int64_t table_size, Address step,
                       Address scale, Address x_q, const char* isa, int64_t threads) {
  const ptq4adm::ActivationKernels& kernels = ptq4adm::select_activation_kernels(isa);
  const py::gil_scoped_release release;
  return static_cast<int>(ptq4adm::layernorm_quantize(
      kernels, {at<const float>(x), rows, columns, row_stride}, at<const float>(weight),
      at<const float>(bias), eps, output(table, table_size, step, scale, x_q), threads));
}

int geglu_quantize(Address x, int64_t rows, int64_t columns, int64_t row_stride, Address table,
                   int64_t table_size, Address step, Address scale, Address x_q, const char* isa,
                   int64_t threads) {
  const ptq4adm::ActivationKernels& kernels = ptq4adm::select_activation_kernels(isa);
  const py::gil_scoped_release release;
  return static_cast<int>(
      ptq4adm::geglu_quantize(kernels, {at<const float>(x), rows, columns, row_stride},
                              output(table, table_size, step, scale, x_q), threads));
}

void activate(const std::string& function, Address x, int64_t count, Address y, const char* isa) {
  const ptq4adm::ActivationKernels& kernels = ptq4adm::select_activation_kernels(isa);
  if (function != "silu" && function != "gelu") {
    throw std::invalid_argument("function '" + function + "': expected silu or gelu");
  }
  (function == "silu" ? kernels.silu : kernels.gelu)(at<const float>(x), count, at<float>(y));
}

}  // namespace

void bind_activations(py::module_& module) {
  module.def("quantize_int8", &quantize_int8, "Quantize; returns a status.");
  module.def("groupnorm_silu_quantize", &groupnorm_silu_quantize,
             "Group norm, SiLU if wanted, quantize; returns a status.");
  module.def("layernorm_quantize", &layernorm_quantize, "Layer norm, quantize; returns a status.");
  module.def("geglu_quantize", &geglu_quantize, "Gated GELU, quantize; returns a status.");
  module.def("activate", &activate, "SiLU or GELU alone, for tests of their accuracy.");
  module.def(
      "activation_isa",
      [](const char* isa) { return ptq4adm::select_activation_kernels(isa).name; },
      "Loops that a name stands for: avx512, avx2 or scalar.");
  module.attr("NON_FINITE") = static_cast<int>(ptq4adm::QuantizeStatus::kNonFinite);
}
