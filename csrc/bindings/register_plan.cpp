// The plan of a step.
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "../engine/catalog.hpp"
#include "module.hpp"
#include "plan.hpp"

namespace sgdcore::bindings {

void register_plan(py::module_& module) {
    py::class_<Plan>(module, "Plan", garbage_collected<Plan>())
        .def(py::init([](const std::string& rule) { return std::make_unique<Plan>(rule_number(rule)); }),
             py::arg("rule"))
        .def("build", &Plan::build, py::arg("parameters"), py::arg("slots"))
        .def("add_group", &Plan::add_group, py::arg("parameters"), py::arg("slots"))
        .def("is_current", &Plan::is_current, py::arg("param_groups"))
        .def_property_readonly("checks", &Plan::checks)
        .def("outdate", &Plan::outdate)
        .def("run", &Plan::run, py::arg("param_groups"), py::arg("grads"), py::arg("zero_grad"))
        .def("missing_states", &Plan::missing_states, py::arg("param_groups"));
}

}  // namespace sgdcore::bindings
