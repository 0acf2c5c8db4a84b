// What the modules that run instructions on the emulator have in common: arrays of Python.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"

namespace py = pybind11;

namespace ptq4adm {

using emulator::Access;
using emulator::Order;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
Array<T> checked(Array<T> array, size_t count, const char* name) {
  if (static_cast<size_t>(array.size()) != count) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(array.size()) +
                                " numbers, needed " + std::to_string(count));
  }
  return array;
}

inline Order order_of(bool is_backward) { return is_backward ? Order::kBackward : Order::kForward; }

}  // namespace ptq4adm
