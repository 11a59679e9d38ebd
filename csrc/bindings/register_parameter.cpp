// Parameter and MomentumSlot. Python subclasses Parameter to document it and add the conveniences.
#include "module.hpp"
#include "parameter.hpp"

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
        // The ndarray itself, or what describes an array on a device: shape and dtype, whose elements cannot be
        // touched.
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

    py::class_<MomentumSlot>(module, "MomentumSlot", garbage_collected<MomentumSlot>())
        .def(py::init<const py::object&>(), py::arg("parameter"))
        .def("set", &MomentumSlot::set, py::arg("array"))
        .def("reserve", &MomentumSlot::reserve, py::arg("storage"))
        .def("note_other_values", &MomentumSlot::note_other_values, py::arg("exist"))
        .def("detach", &MomentumSlot::detach)
        .def_property_readonly("initialized", &MomentumSlot::initialized)
        .def_property_readonly("momentum", [](const MomentumSlot& self) { return array_or_none(self.momentum()); });
}

}  // namespace sgdcore::bindings
