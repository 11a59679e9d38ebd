// What was built, what the machine runs, and the two settings: instruction set and threads.
#include <pybind11/stl.h>

#include <string>

#include "../cpu/dispatch.hpp"
#include "../cpu/threads.hpp"
#include "arrays.hpp"
#include "module.hpp"

namespace sgdcore::bindings {
namespace py = pybind11;

void register_info(py::module_& module) {
    module.attr("__version__") = SGDCORE_VERSION;
    module.attr("compiler") = std::string(SGDCORE_COMPILER);
    module.attr("build_flags") = std::string(SGDCORE_BUILD_FLAGS);

    py::list names;
    for (int dtype = 0; dtype < dtype_count; ++dtype) names.append(dtype_name(static_cast<DType>(dtype)));
    module.attr("storage_types") = py::tuple(names);

    module.def("instruction_sets", [] {
        py::dict supported;
        for (const cpu::InstructionSet& isa : cpu::instruction_sets()) supported[py::str(isa.name)] = isa.supported();
        return supported;
    });
    module.def("instruction_set", [] { return cpu::instruction_set().name; });
    module.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"));
    module.def("num_threads", &cpu::num_threads);
    module.def("set_num_threads", &cpu::set_num_threads, py::arg("count"));
}

}  // namespace sgdcore::bindings
