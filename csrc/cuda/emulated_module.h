// What the Python modules of emulated matrix products have in common: parameters and tiles as on a
// GPU, the memory that a launch may touch, and the order in which its threads run.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../bindings/cuda_params.h"
#include "emulator.h"

namespace ptq4adm::bindings {

// In which order the launches of this module run blocks and threads.
inline emulator::Order& emulated_order() {
  static emulator::Order order = emulator::Order::kForward;
  return order;
}

inline void bind_emulated(py::module_& module) {
  bind_params(module);
  bind_tiles(module);
  py::enum_<emulator::Access>(module, "Access", py::module_local())
      .value("read", emulator::Access::kRead)
      .value("read_write", emulator::Access::kReadWrite)
      .value("uninitialized", emulator::Access::kUninitialized);
  module.def("register_memory",
             [](Address start, size_t bytes, emulator::Access access, const std::string& name) {
               emulator::register_memory(at<const void>(start), bytes, access, name);
             });
  module.def("run_backward", [](bool is_backward) {
    emulated_order() = is_backward ? emulator::Order::kBackward : emulator::Order::kForward;
  });
  module.def("forget_memory", &emulator::forget_memory);
}

}  // namespace ptq4adm::bindings
