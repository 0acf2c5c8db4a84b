#include "attention.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "../cpu/attention.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Address = std::uintptr_t;
using Strides = std::array<int64_t, 3>;  // floats to the next sample, token, head

void attention(Address q, Address k, Address v, Address bias, Address out, const Strides& q_strides,
               const Strides& k_strides, const Strides& v_strides, const Strides& out_strides,
               std::array<int64_t, 5> sizes, float scale, const std::string& isa, int64_t threads) {
  const ptq4adm::AttentionKernels& kernels = ptq4adm::select_attention_kernels(isa.c_str());
  const auto [batch_size, heads, queries, keys, head_dim] = sizes;
  ptq4adm::AttentionBatch batch{};
  batch.first = {reinterpret_cast<const float*>(q),
                 reinterpret_cast<const float*>(k),
                 reinterpret_cast<const float*>(v),
                 reinterpret_cast<const float*>(bias),
                 reinterpret_cast<float*>(out),
                 q_strides[1],
                 k_strides[1],
                 v_strides[1],
                 out_strides[1],
                 queries,
                 keys,
                 head_dim,
                 scale};
  batch.batch = batch_size;
  batch.heads = heads;
  batch.q_sample = q_strides[0], batch.q_head = q_strides[2];
  batch.k_sample = k_strides[0], batch.k_head = k_strides[2];
  batch.v_sample = v_strides[0], batch.v_head = v_strides[2];
  batch.out_sample = out_strides[0], batch.out_head = out_strides[2];
  batch.bias_sample = keys;
  const py::gil_scoped_release release;
  ptq4adm::attention(kernels, batch, threads);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention", &attention, "Float attention; strides are (sample, token, head).",
             py::kw_only(), "q"_a, "k"_a, "v"_a, "bias"_a, "out"_a, "q_strides"_a, "k_strides"_a,
             "v_strides"_a, "out_strides"_a, "sizes"_a, "scale"_a, "isa"_a, "threads"_a);
}
