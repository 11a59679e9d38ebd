// The step over torch tensors.
#include "module.hpp"
#include "torch_plan.hpp"

namespace sgdcore::bindings {

void register_torch_plan(py::module_& module) {
    py::class_<TorchPlan>(module, "TorchPlan", garbage_collected<TorchPlan>())
        .def(py::init([](py::object exchange_api, py::object describe, py::object increment_version, py::object pin,
                         py::object is_negated, py::object tensor_type, py::object parameter_type,
                         py::object grad_descriptor) {
                 return TorchPlan({std::move(exchange_api), std::move(describe), std::move(increment_version),
                                   std::move(pin), std::move(is_negated), std::move(tensor_type),
                                   std::move(parameter_type), std::move(grad_descriptor)});
             }),
             py::kw_only(), py::arg("exchange_api"), py::arg("describe"), py::arg("increment_version"), py::arg("pin"),
             py::arg("is_negated"), py::arg("tensor_type"), py::arg("parameter_type"), py::arg("grad_descriptor"))
        .def("run", &TorchPlan::run, py::arg("param_groups"), py::arg("state"), py::arg("zero_grad"),
             py::arg("grad_factor"))
        .def("run_items", &TorchPlan::run_items, py::arg("param_groups"), py::arg("items"), py::arg("grad_factor"),
             py::arg("dry_run"))
        .def_readwrite("state_exposed", &TorchPlan::state_exposed)
        .def("unpin", &TorchPlan::unpin)
        .def("is_dense", &TorchPlan::is_dense, py::arg("tensor"));
}

}  // namespace sgdcore::bindings
