// Adds the functions over activations to the module.
#pragma once

#include <pybind11/pybind11.h>

void bind_activations(pybind11::module_& module);
