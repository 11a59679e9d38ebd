// The rules' declarations, the options' states and the averages, for Python.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "../engine/averaged_steps.hpp"
#include "../engine/catalog.hpp"
#include "hypers.hpp"
#include "module.hpp"

namespace sgdcore::bindings {
namespace {

const RuleInfo& info_of(const std::string& rule) { return rules()[static_cast<std::size_t>(rule_number(rule))]; }

const char* kind_name(HyperSpec::Kind kind) {
    constexpr const char* names[] = {"number", "flag", "mode", "count", "sum"};
    return names[kind];
}

const char* start_name(Start start) {
    constexpr const char* names[] = {"nothing", "zeros", "parameter"};
    return names[static_cast<int>(start)];
}

}  // namespace

void register_rules(py::module_& module) {
    module.def("rule_names", [] {
        py::list names;
        for (const RuleInfo& info : rules()) names.append(info.name);
        return names;
    });

    // ((key, kind), ...), ((key of the state, key of its dtype, what it starts as), ...)
    module.def(
        "declaration",
        [](const std::string& rule) {
            py::list hypers, states;
            for (const HyperSpec& spec : info_of(rule).hypers) {
                hypers.append(py::make_tuple(spec.key, kind_name(spec.kind)));
            }
            for (const StateSpec& spec : info_of(rule).states) {
                states.append(py::make_tuple(spec.key, spec.dtype_key, start_name(spec.start)));
            }
            return py::make_tuple(py::tuple(hypers), py::tuple(states));
        },
        py::arg("rule"));

    // Raises RuntimeError if the groups allow no step now.
    module.def(
        "require_steps",
        [](const std::string& rule, const py::list& param_groups) {
            GroupHypers hypers;
            hypers.read(rule_number(rule), param_groups);
            hypers.require_steps(rule_number(rule));
        },
        py::arg("rule"), py::arg("param_groups"));

    // ((number of the state, its key, key of its dtype), ...)
    module.def("extra_states", [] {
        py::list states;
        int number = max_states;
        for (const StateSpec& spec : extra_states) {
            states.append(py::make_tuple(number++, spec.key, spec.dtype_key));
        }
        return py::tuple(states);
    });

    py::class_<AveragedSteps, std::shared_ptr<AveragedSteps>>(module, "AveragedSteps")
        .def(py::init([](std::optional<double> decay, std::int64_t start) {
                 return AveragedSteps{.decay = decay.value_or(0), .is_mean = !decay, .start = start};
             }),
             py::arg("decay"), py::arg("start"))
        .def_property_readonly("weight", &AveragedSteps::weight)
        .def_property_readonly("active", [](const AveragedSteps& steps) { return steps.extras() != 0; })
        .def_readwrite("taken", &AveragedSteps::taken)
        .def_readwrite("in_place", &AveragedSteps::in_place);

    // (whether each state takes part in the steps of a group, ...), and Hyper::skips_zero_grads.
    module.def(
        "states_in_use",
        [](const std::string& rule, const py::dict& group) {
            py::list groups;
            groups.append(group);
            GroupHypers hypers;
            hypers.read(rule_number(rule), groups);
            py::list in_use;
            for (std::size_t state = 0; state < info_of(rule).states.size(); ++state) {
                in_use.append(hypers[0].has_state(static_cast<int>(state)));
            }
            return py::make_tuple(py::tuple(in_use), hypers[0].skips_zero_grads);
        },
        py::arg("rule"), py::arg("group"));
}

}  // namespace sgdcore::bindings
