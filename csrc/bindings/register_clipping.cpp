// What an optimizer does to the gradients of its steps.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "arrays.hpp"
#include "clipping.hpp"
#include "gil.hpp"
#include "module.hpp"
#include "text.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

namespace {

/// Gradients as tensors of a work list, in C order, with the memory that they refer to.
struct Grads {
    std::vector<ArrayRef> refs;
    std::vector<std::vector<Axis>> axes;
    std::vector<TensorRef> tensors;

    /// Raises TypeError or ValueError for one that cannot be read, or written if `written`.
    Grads(const py::list& arrays, bool written) {
        axes.resize(arrays.size());  // the tensors refer to them
        for (std::size_t i = 0; i < arrays.size(); ++i) {
            const Argument argument{"grads", static_cast<std::ptrdiff_t>(i)};
            const py::object item = arrays[i];
            const ArrayRef& ref = refs.emplace_back(read_array(item, argument));
            if (ref.device != cpu_device) {
                throw py::value_error(argument.text() + ": expected an array on the CPU, got one on a device");
            }
            if (written && (!ref.writable || ref.copied)) {
                throw py::value_error(argument.text() + ": expected an array that can be written");
            }
            if (written && repeats_elements(ref)) {
                throw py::value_error(argument.text() + ": expected elements with memory of their own, got strides " +
                                      utf8(py::str(ref.array.attr("strides"))));
            }
            for (int axis = 0; axis < ref.array.ndim(); ++axis) {
                if (ref.array.shape(axis) != 1)
                    append_axis(axes[i], 0, {ref.array.shape(axis), ref.array.strides(axis)});
            }
            if (axes[i].size() == 1 && axes[i][0].stride == static_cast<std::int64_t>(item_size(ref.dtype)))
                axes[i] = {};
            TensorRef& tensor = tensors.emplace_back();
            tensor.param = tensor.grad = ref.data;
            tensor.size = ref.size;
            tensor.param_dtype = tensor.grad_dtype = ref.dtype;
            tensor.grad_axes = axes[i];
        }
    }
};

}  // namespace

void register_clipping(py::module_& module) {
    // The sum of the squares of all elements.
    module.def(
        "squares_of",
        [](const py::list& grads) {
            const Grads listed(grads, false);
            const Hyper hyper;
            const GilRelease release;
            return cpu::squares_of(listed.tensors, {&hyper, 1}, {}).sum;
        },
        py::arg("grads"));
    // Multiplies the arrays in place.
    module.def(
        "scale_grads",
        [](const py::list& grads, double factor) {
            const Grads listed(grads, true);
            const GilRelease release;
            cpu::scale_grads(listed.tensors, factor);
        },
        py::arg("grads"), py::arg("factor"));
    module.def("clip_coefficient", &Clipping::coefficient, py::arg("max_norm"), py::arg("norm"));
    using State = std::tuple<std::optional<double>, std::optional<double>, bool, std::int64_t>;
    py::class_<Clipping, std::shared_ptr<Clipping>>(module, "Clipping")
        .def(py::init<>())
        .def_readwrite("clip_value", &Clipping::clip_value)
        .def_readwrite("max_norm", &Clipping::max_norm)
        .def_readwrite("skip_nonfinite", &Clipping::skip_nonfinite)
        .def_readwrite("new_result", &Clipping::new_result)
        .def_readwrite("left_out", &Clipping::left_out)
        .def_readonly("on_device", &Clipping::on_device)
        .def_readonly("result", &Clipping::result)
        .def_readonly("norm", &Clipping::norm)
        .def_readonly("skipped", &Clipping::skipped)
        .def_property_readonly("asks_for_norm", &Clipping::asks_for_norm)
        .def(py::pickle(
            [](const Clipping& clipping) {
                return py::cast(
                    State(clipping.clip_value, clipping.max_norm, clipping.skip_nonfinite, clipping.skipped));
            },
            [](const py::object& state) {
                auto clipping = std::make_shared<Clipping>();
                std::tie(clipping->clip_value, clipping->max_norm, clipping->skip_nonfinite, clipping->skipped) =
                    py::cast<State>(state);
                return clipping;
            }));
}

}  // namespace sgdcore::bindings
