// The plan of a step.
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "../engine/catalog.hpp"
#include "fast_method.hpp"
#include "module.hpp"
#include "plan.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

py::object run(Plan& plan, PyObject* const* arguments) {
    if (!PyList_Check(arguments[0])) {
        throw py::type_error("param_groups: expected a list, got " + repr_text(object_of(arguments[0])));
    }
    const auto param_groups = py::reinterpret_borrow<py::list>(arguments[0]);
    return py::bool_(plan.run(param_groups, object_of(arguments[1]), truth_of(arguments[2])));
}

}  // namespace

void register_plan(py::module_& module) {
    py::class_<Plan> type(module, "Plan", garbage_collected<Plan>());
    type.def(py::init([](const std::string& rule) { return std::make_unique<Plan>(rule_number(rule)); }),
             py::arg("rule"))
        .def_readwrite("averaged", &Plan::averaged)
        .def("build", &Plan::build, py::arg("parameters"), py::arg("slots"))
        .def("add_group", &Plan::add_group, py::arg("parameters"), py::arg("slots"))
        .def("is_current", &Plan::is_current, py::arg("param_groups"))
        .def_property_readonly("checks", &Plan::checks)
        .def_readwrite("clipping", &Plan::clipping)
        .def("outdate", &Plan::outdate)
        .def("missing_states", &Plan::missing_states, py::arg("param_groups"));
    def_fast<Plan, 3, run>(type, "run", "run($self, param_groups, grads, zero_grad, /)\n--\n\n");
}

}  // namespace sgdcore::bindings
