// One registration function per topic, each in a file of its own.
#pragma once

#include <pybind11/pybind11.h>

namespace sgdcore::bindings {

void register_info(pybind11::module_& module);
void register_functions(pybind11::module_& module);
void register_devices(pybind11::module_& module);
void register_arrays(pybind11::module_& module);
void register_buffer(pybind11::module_& module);
void register_parameter(pybind11::module_& module);
void register_clipping(pybind11::module_& module);
void register_rules(pybind11::module_& module);
void register_plan(pybind11::module_& module);
void register_torch_plan(pybind11::module_& module);
void register_benchmarks(pybind11::module_& module);

}  // namespace sgdcore::bindings
