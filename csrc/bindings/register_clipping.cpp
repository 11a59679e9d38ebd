// What an optimizer does to the gradients of its steps.
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "clipping.hpp"
#include "module.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

void register_clipping(py::module_& module) {
    py::class_<Clipping, std::shared_ptr<Clipping>>(module, "Clipping")
        .def(py::init<>())
        .def_readwrite("clip_value", &Clipping::clip_value)
        .def(py::pickle([](const Clipping& clipping) { return py::make_tuple(clipping.clip_value); },
                        [](const py::tuple& state) {
                            auto clipping = std::make_shared<Clipping>();
                            clipping->clip_value = py::cast<std::optional<double>>(state[0]);
                            return clipping;
                        }));
}

}  // namespace sgdcore::bindings
