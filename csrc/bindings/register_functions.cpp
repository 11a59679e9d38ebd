// How the package hands in the functions that the core calls.
#include <stdexcept>
#include <utility>

#include "module.hpp"
#include "python_functions.hpp"

namespace sgdcore::bindings {
namespace {

/// Never destroyed: the functions may not be released after Python has ended.
PythonFunctions*& handed_in() {
    static PythonFunctions* functions = nullptr;  // guarded by the GIL
    return functions;
}

}  // namespace

const PythonFunctions& python_functions() {
    if (handed_in() == nullptr) throw std::runtime_error("sgdcore._core is used without the package");
    return *handed_in();
}

void register_functions(py::module_& module) {
    module.def(
        "use_functions",
        [](py::object load_runtime, py::object current_stream, py::object assign, py::object storage_dtype) {
            delete std::exchange(handed_in(), new PythonFunctions{std::move(load_runtime), std::move(current_stream),
                                                                  std::move(assign), std::move(storage_dtype)});
        },
        py::kw_only(), py::arg("load_runtime"), py::arg("current_stream"), py::arg("assign"), py::arg("storage_dtype"));
}

}  // namespace sgdcore::bindings
