// What was built, what the machine has and how fast its memory is, and the two settings: instruction set and threads.
#include <pybind11/stl.h>

#include <string>

#include "../cpu/dispatch.hpp"
#include "../cpu/memory_pass.hpp"
#include "../cpu/threads.hpp"
#include "arrays.hpp"
#include "module.hpp"

namespace sgdcore::bindings {
namespace py = pybind11;

void register_info(py::module_& module) {
    module.attr("__version__") = SGDCORE_VERSION;
    module.attr("compiler") = std::string(SGDCORE_COMPILER);
    module.attr("build_flags") = std::string(SGDCORE_BUILD_FLAGS);

    module.def("instruction_sets", [] {
        py::dict supported;
        for (const cpu::InstructionSet& isa : cpu::instruction_sets()) supported[py::str(isa.name)] = isa.supported();
        return supported;
    });
    module.def("instruction_set", [] { return cpu::instruction_set().name; });
    module.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"));
    module.def("num_threads", &cpu::num_threads);
    // For the benchmarks: contiguous arrays of one size, exchanged and read (see cpu/memory_pass.hpp).
    module.def(
        "stream",
        [](const py::object& param, const py::object& grad, const py::object& momentum, bool clear) {
            const ArrayRef p = read_array(param, "param"), g = read_array(grad, "grad");
            const ArrayRef b = momentum.is_none() ? p : read_array(momentum, "momentum");
            require_updatable(p, "param");
            require_updatable(g, "grad");
            require_updatable(b, "momentum");
            require_same_shape(g, p, "grad");
            require_same_shape(b, p, "momentum");
            if (g.dtype != p.dtype || b.dtype != p.dtype) throw py::type_error("stream: expected arrays of one dtype");
            std::byte* const momentum_data = momentum.is_none() ? nullptr : b.data;
            const py::gil_scoped_release release;
            const auto size = p.size * static_cast<std::int64_t>(item_size(p.dtype));
            return cpu::memory_pass(p.data, g.data, momentum_data, size, clear);
        },
        py::arg("param"), py::arg("grad"), py::arg("momentum") = py::none(), py::arg("clear") = false);
    module.def("set_num_threads", &cpu::set_num_threads, py::arg("count"));
}

}  // namespace sgdcore::bindings
