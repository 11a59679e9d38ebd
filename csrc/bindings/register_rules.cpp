// The rules' declarations, for Python.
#include <string>

#include "../engine/catalog.hpp"
#include "hypers.hpp"
#include "module.hpp"

namespace sgdcore::bindings {
namespace {

const RuleInfo& info_of(const std::string& rule) { return rules()[static_cast<std::size_t>(rule_number(rule))]; }

}  // namespace

void register_rules(py::module_& module) {
    module.def("rule_names", [] {
        py::list names;
        for (const RuleInfo& info : rules()) names.append(info.name);
        return names;
    });

    // ((key, whether it is a flag), ...), ((key of the state, key of its dtype), ...)
    module.def(
        "declaration",
        [](const std::string& rule) {
            py::list hypers, states;
            for (const HyperSpec& spec : info_of(rule).hypers) {
                hypers.append(py::make_tuple(spec.key, spec.kind == HyperSpec::flag));
            }
            for (const StateSpec& spec : info_of(rule).states) {
                states.append(py::make_tuple(spec.key, spec.dtype_key));
            }
            return py::make_tuple(py::tuple(hypers), py::tuple(states));
        },
        py::arg("rule"));

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
