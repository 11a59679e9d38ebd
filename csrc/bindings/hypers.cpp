// Reading the dicts of param_groups.
#include "hypers.hpp"

#include <limits>
#include <optional>
#include <string>

#include "arrays.hpp"

namespace sgdcore::bindings {
namespace {

/// An exception that is set becomes the TypeError's cause.
[[noreturn]] void refuse_number(PyObject* value, PyObject* key, std::size_t index) {
    const bool caused = PyErr_Occurred() != nullptr;
    if (caused && !PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();  // such as KeyboardInterrupt
    std::optional<py::error_already_set> cause;
    if (caused) cause.emplace();  // takes the exception, which would be in the way of repr
    const std::string text = "param_groups[" + std::to_string(index) + "]['" + py::cast<std::string>(py::handle(key)) +
                             "']: expected a number, got " + py::cast<std::string>(py::repr(value));
    if (!caused) throw py::type_error(text);
    py::raise_from(*cause, PyExc_TypeError, text.c_str());
    throw py::error_already_set();
}

/// True for arrays and tensors. A tensor that requires a gradient warns when it is converted in another way; NumPy's
/// scalars are converted as they are, since their item() allocates memory.
bool converts_by_item(PyObject* value) {
    static PyObject* const tensor_mark = PyUnicode_InternFromString("requires_grad");
    return py::isinstance<py::array>(value) || PyObject_HasAttr(value, tensor_mark) != 0;
}

/// A number: a float, whatever converts to one, or an array or tensor of one element.
double number_of(PyObject* group, PyObject* key, std::size_t index) {
    PyObject* value = group_item(group, key, index);
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    py::object scalar = py::reinterpret_borrow<py::object>(value);
    if (!PyFloat_Check(value) && !PyLong_Check(value) && converts_by_item(value)) {
        PyObject* item = PyObject_CallMethod(value, "item", nullptr);
        if (item == nullptr) refuse_number(value, key, index);
        scalar = py::reinterpret_steal<py::object>(item);
    }
    const double number = PyFloat_AsDouble(scalar.ptr());
    if (number == -1 && PyErr_Occurred()) refuse_number(value, key, index);
    return number;
}

/// The number if it is on the host, else NaN and where it is.
double number_or_place_of(PyObject* group, PyObject* key, std::size_t index, DeviceNumber& place) {
    PyObject* value = group_item(group, key, index);
    if (PyFloat_CheckExact(value) || PyLong_CheckExact(value) || !is_on_device(value)) {
        return number_of(group, key, index);
    }
    const ArrayRef ref = read_array(value, "hyperparameter");
    if (ref.size != 1) refuse_number(value, key, index);
    place = {ref.data, ref.dtype, ref.device};
    return std::numeric_limits<double>::quiet_NaN();
}

PyObject* group_at(const py::list& param_groups, std::size_t index) {
    PyObject* group = PyList_GetItem(param_groups.ptr(), static_cast<Py_ssize_t>(index));
    if (group == nullptr) throw py::error_already_set();
    if (!PyDict_Check(group)) {
        throw py::type_error("param_groups[" + std::to_string(index) + "]: expected a dict, got " +
                             py::cast<std::string>(py::repr(group)));
    }
    return group;
}

bool flag_of(PyObject* group, PyObject* key, std::size_t index) {
    const int truth = PyObject_IsTrue(group_item(group, key, index));
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
}

}  // namespace

const Keys& keys() {
    const auto intern = [](const char* text) { return PyUnicode_InternFromString(text); };
    static const Keys interned{intern("params"),       intern("lr"),       intern("momentum"), intern("dampening"),
                               intern("weight_decay"), intern("nesterov"), intern("maximize")};
    return interned;
}

PyObject* group_item(PyObject* group, PyObject* key, std::size_t index) {
    PyObject* value = PyDict_GetItemWithError(group, key);
    if (value == nullptr) {
        if (PyErr_Occurred()) throw py::error_already_set();
        throw py::key_error("param_groups[" + std::to_string(index) + "] has no '" +
                            py::cast<std::string>(py::handle(key)) + "'");
    }
    return value;
}

void read_hypers(const py::list& param_groups, std::vector<SgdHyper>& hypers) {
    const Keys& key = keys();
    hypers.clear();
    for (std::size_t i = 0; i < param_groups.size(); ++i) {
        PyObject* group = group_at(param_groups, i);
        hypers.push_back({number_of(group, key.lr, i), number_of(group, key.momentum, i),
                          number_of(group, key.dampening, i), number_of(group, key.weight_decay, i),
                          flag_of(group, key.nesterov, i), flag_of(group, key.maximize, i)});
    }
}

void read_hypers(const py::list& param_groups, std::vector<SgdHyper>& hypers, std::vector<GroupScalars>& scalars) {
    const Keys& key = keys();
    hypers.clear();
    scalars.clear();
    for (std::size_t i = 0; i < param_groups.size(); ++i) {
        PyObject* group = group_at(param_groups, i);
        GroupScalars on_device;
        const double lr = number_or_place_of(group, key.lr, i, on_device.lr);
        const double momentum = number_of(group, key.momentum, i), dampening = number_of(group, key.dampening, i);
        const double weight_decay = number_or_place_of(group, key.weight_decay, i, on_device.weight_decay);
        hypers.push_back(
            {lr, momentum, dampening, weight_decay, flag_of(group, key.nesterov, i), flag_of(group, key.maximize, i)});
        if (on_device.lr.address == nullptr && on_device.weight_decay.address == nullptr) continue;
        scalars.resize(param_groups.size());
        scalars[i] = on_device;
    }
}

}  // namespace sgdcore::bindings
