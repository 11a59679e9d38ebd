// Parameter and StateSlots. The package derives its documented Parameter from this one.
#include <cstdint>
#include <memory>
#include <string>

#include "module.hpp"
#include "parameter.hpp"
#include "states.hpp"

namespace sgdcore::bindings {
namespace {

py::object array_or_none(const ArrayRef& ref) { return ref.empty() ? py::none() : ref.object(); }

}  // namespace

void register_parameter(py::module_& module) {
    py::class_<Parameter>(module, "Parameter", garbage_collected<Parameter>())
        .def(py::init<const py::object&, std::string, py::object, const py::object&>(), py::arg("data"), py::kw_only(),
             py::arg("name") = "", py::arg("buffer") = py::none(), py::arg("buffer_grad") = py::none())
        .def_property(
            "data", [](const Parameter& self) { return self.data().object(); }, &Parameter::set_data)
        .def_property(
            "grad", [](const Parameter& self) { return array_or_none(self.grad()); }, &Parameter::set_grad)
        // The ndarray itself, or an ndarray that only describes an array on a device.
        .def_property_readonly("_description", [](const Parameter& self) { return self.data().array; })
        .def_property_readonly("device", [](const Parameter& self) { return self.data().device; })
        .def_property_readonly("name", &Parameter::name)
        .def_property_readonly("buffer", &Parameter::buffer);

    module.def(
        "zero_grads",
        [](const py::list& param_groups, bool set_to_none) {
            const auto for_each = [&](auto&& function) {
                for (const py::handle group : param_groups) {
                    for (const py::handle parameter : group["params"]) function(py::cast<Parameter&>(parameter));
                }
            };
            for_each([&](const Parameter& parameter) { parameter.require_clearable(set_to_none); });
            for_each([&](Parameter& parameter) { parameter.zero_grad(set_to_none); });
        },
        py::arg("param_groups"), py::arg("set_to_none"));

    py::class_<StateSlots>(module, "StateSlots", garbage_collected<StateSlots>())
        .def(py::init([](const std::string& rule, const py::object& parameter, std::uint32_t extras) {
                 return std::make_unique<StateSlots>(rule_number(rule), extras, parameter);
             }),
             py::arg("rule"), py::arg("parameter"), py::arg("extras") = 0)
        .def("find", &StateSlots::find, py::arg("key"))
        .def("set", &StateSlots::set, py::arg("state"), py::arg("array"))
        .def("reserve", &StateSlots::reserve, py::arg("state"), py::arg("storage"))
        .def("note_other_values", &StateSlots::note_other_values, py::arg("exist"))
        .def("detach", &StateSlots::detach)
        .def_property("steps", &StateSlots::steps, &StateSlots::set_steps)
        .def("holds", &StateSlots::holds, py::arg("state"))
        .def(
            "array", [](const StateSlots& self, int state) { return array_or_none(self.array(state)); },
            py::arg("state"));
}

}  // namespace sgdcore::bindings
