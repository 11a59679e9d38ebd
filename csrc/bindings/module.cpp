// The extension module sgdcore._core: private; the package's Python files are the interface.
#include "module.hpp"

PYBIND11_MODULE(_core, module) {
    using namespace sgdcore::bindings;
    register_info(module);
    register_functions(module);
    register_devices(module);
    register_arrays(module);
    register_buffer(module);
    register_parameter(module);
    register_rules(module);
    register_clipping(module);
    register_plan(module);
    register_torch_plan(module);
    register_benchmarks(module);
}
