// The step over torch tensors.
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "../engine/catalog.hpp"
#include "fast_method.hpp"
#include "module.hpp"
#include "torch_plan.hpp"

namespace sgdcore::bindings {
namespace {

py::object run(TorchPlan& plan, PyObject* const* arguments) {
    return plan.run(object_of(arguments[0]), object_of(arguments[1]), truth_of(arguments[2]), float_of(arguments[3]),
                    object_of(arguments[4]));
}

py::object run_unobserved(TorchPlan& plan, PyObject* const* arguments) {
    return plan.run_unobserved(object_of(arguments[0]), object_of(arguments[1]), truth_of(arguments[2]));
}

}  // namespace

void register_torch_plan(py::module_& module) {
    py::class_<TorchPlan> type(module, "TorchPlan", garbage_collected<TorchPlan>());
    type.def(py::init([](const std::string& rule, py::object exchange_api, py::object describe, py::object access,
                         py::object increment_version, py::object increment_version_where_possible,
                         py::object is_negated, py::object tensor_type, py::object parameter_type,
                         py::object grad_descriptor, py::object requires_grad_descriptor, py::object kind_of,
                         py::object sparse_indices, py::object sparse_values, py::object current_stream,
                         py::object profiler_enabled, py::object refuse_fullgraph) {
                 return TorchPlan(
                     rule_number(rule),
                     {std::move(exchange_api), std::move(describe), std::move(access), std::move(increment_version),
                      std::move(increment_version_where_possible), std::move(is_negated), std::move(tensor_type),
                      std::move(parameter_type), std::move(grad_descriptor), std::move(requires_grad_descriptor),
                      std::move(kind_of), std::move(sparse_indices), std::move(sparse_values),
                      std::move(current_stream), std::move(profiler_enabled), std::move(refuse_fullgraph)});
             }),
             py::kw_only(), py::arg("rule"), py::arg("exchange_api"), py::arg("describe"), py::arg("access"),
             py::arg("increment_version"), py::arg("increment_version_where_possible"), py::arg("is_negated"),
             py::arg("tensor_type"), py::arg("parameter_type"), py::arg("grad_descriptor"),
             py::arg("requires_grad_descriptor"), py::arg("kind_of"), py::arg("sparse_indices"),
             py::arg("sparse_values"), py::arg("current_stream"), py::arg("profiler_enabled"),
             py::arg("refuse_fullgraph"))
        .def(
            "observe",
            [](TorchPlan& plan, std::vector<py::dict> dicts) { plan.observers = Observers(std::move(dicts)); },
            py::arg("dicts"))
        .def_readwrite("clipping", &TorchPlan::clipping)
        .def_property("averaged", &TorchPlan::averaged, &TorchPlan::set_averaged)
        .def_readwrite("in_backward", &TorchPlan::in_backward)
        .def("run_prepared", &TorchPlan::run_prepared, py::arg("param_groups"), py::arg("state"), py::arg("zero_grad"),
             py::arg("grad_factor"), py::arg("scaling"), py::arg("left_out"), py::arg("new_states"), py::arg("items"))
        .def("run_items", &TorchPlan::run_items, py::arg("param_groups"), py::arg("items"), py::arg("grad_factor"),
             py::arg("dry_run"), py::arg("scaling") = py::none())
        .def("finish_step", &TorchPlan::finish_step, py::arg("param_groups"))
        .def("set_pending", &TorchPlan::set_pending, py::arg("flags"))
        .def_readwrite("state_exposed", &TorchPlan::state_exposed)
        .def("is_dense", &TorchPlan::is_dense, py::arg("tensor"));
    def_fast<TorchPlan, 3, run_unobserved>(type, "run_unobserved",
                                           "run_unobserved($self, param_groups, state, zero_grad, /)\n--\n\n");
    def_fast<TorchPlan, 5, run>(type, "run",
                                "run($self, param_groups, state, zero_grad, grad_factor, scaling, /)\n--\n\n");
}

}  // namespace sgdcore::bindings
