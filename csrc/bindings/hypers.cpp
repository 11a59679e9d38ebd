// Reading the dicts of param_groups.
#include "hypers.hpp"

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "../engine/catalog.hpp"
#include "arrays.hpp"
#include "gil.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

constexpr const char* expected_number = "a number";

/// "param_groups[1]['lr']"
std::string hyper_text(PyObject* key, std::size_t index) {
    return "param_groups[" + std::to_string(index) + "]['" + py::cast<std::string>(py::handle(key)) + "']";
}

/// Raises TypeError, or ValueError where an OverflowError is set. An exception that is set becomes the cause.
[[noreturn]] void refuse(const py::object& value, const char* expected, PyObject* key, std::size_t index) {
    const bool caused = PyErr_Occurred() != nullptr;
    if (caused && !PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();  // such as KeyboardInterrupt
    const bool too_large = caused && PyErr_ExceptionMatches(PyExc_OverflowError);
    std::optional<py::error_already_set> cause;
    if (caused) cause.emplace();  // takes the exception, which would be in the way of repr
    const std::string text = hyper_text(key, index) + ": expected " + expected +
                             (too_large ? " that a float can hold, got " : ", got ") +
                             repr_text(value, too_large ? 80 : std::string::npos);
    if (!caused) throw py::type_error(text);
    py::raise_from(*cause, too_large ? PyExc_ValueError : PyExc_TypeError, text.c_str());
    throw py::error_already_set();
}

/// Raises OverflowError if a number that is finite became an infinite one, as float() makes of a large Decimal.
void require_kept(PyObject* value, double number) {
    if (!std::isinf(number) || PyFloat_Check(value)) return;
    const py::float_ infinity(number);
    const int equal = PyObject_RichCompareBool(value, infinity.ptr(), Py_EQ);
    if (equal == 0) PyErr_SetString(PyExc_OverflowError, "the number is finite and its float is not");
}

/// True for arrays and tensors. A tensor that requires a gradient warns when it is converted in another way; NumPy's
/// scalars are converted as they are, since their item() allocates memory.
bool converts_by_item(const py::object& value) {
    static PyObject* const tensor_mark = PyUnicode_InternFromString("requires_grad");
    return py::isinstance<py::array>(value) ||
           unless_python_ends([&] { return PyObject_HasAttr(value.ptr(), tensor_mark); }) != 0;
}

/// group[key]: a float, whatever converts to one, or an array or tensor of one element. If there is a `place`, a number
/// on a device stays there, and is NaN here.
double number_of(PyObject* group, PyObject* key, std::size_t index, const BeforeCode& before_code,
                 DeviceNumber* place = nullptr) {
    PyObject* const item = group_item(group, key, index);
    if (PyFloat_CheckExact(item)) return PyFloat_AS_DOUBLE(item);
    if (!PyLong_CheckExact(item)) before_code();
    const auto value = py::reinterpret_borrow<py::object>(item);  // what follows may run code that changes the group
    if (place != nullptr && !PyLong_CheckExact(item) && is_on_device(value)) {
        const std::string text = hyper_text(key, index);
        const ArrayRef ref = read_array(value, text.c_str());
        if (ref.size != 1) refuse(value, expected_number, key, index);
        *place = {ref.data, ref.dtype, ref.device};
        return std::numeric_limits<double>::quiet_NaN();
    }
    py::object scalar = value;
    if (!PyFloat_Check(item) && !PyLong_Check(item) && converts_by_item(value)) {
        PyObject* const converted = unless_python_ends([&] { return PyObject_CallMethod(item, "item", nullptr); });
        if (converted == nullptr) refuse(value, expected_number, key, index);
        scalar = py::reinterpret_steal<py::object>(converted);
    }
    const double number = unless_python_ends([&] { return PyFloat_AsDouble(scalar.ptr()); });
    if (number != -1) require_kept(scalar.ptr(), number);
    if (PyErr_Occurred()) refuse(value, expected_number, key, index);
    return number;
}

bool flag_of(PyObject* group, PyObject* key, std::size_t index, const BeforeCode& before_code) {
    PyObject* const item = group_item(group, key, index);
    if (item == Py_False || item == Py_True) return item == Py_True;
    before_code();
    const auto value = py::reinterpret_borrow<py::object>(item);
    const int truth = unless_python_ends([&] { return PyObject_IsTrue(value.ptr()); });
    if (truth < 0) refuse(value, "True or False", key, index);
    return truth != 0;
}

struct HyperKeys {
    PyObject* of[Rules::size][max_hypers] = {};
    HyperKeys() {
        for (std::size_t rule = 0; rule < Rules::size; ++rule) {
            int hyper = 0;
            for (const HyperSpec& spec : rules()[rule].hypers) of[rule][hyper++] = PyUnicode_InternFromString(spec.key);
        }
    }
};

/// The keys of a rule's hyperparameters, interned once.
PyObject* const* keys_of(int rule) {
    static const HyperKeys keys;
    return keys.of[rule];
}

}  // namespace

PyObject* group_at(const py::list& param_groups, std::size_t index) {
    PyObject* group = PyList_GetItem(param_groups.ptr(), static_cast<Py_ssize_t>(index));
    if (group == nullptr) throw py::error_already_set();
    if (!PyDict_Check(group)) {
        throw py::type_error("param_groups[" + std::to_string(index) + "]: expected a dict, got " + repr_text(group));
    }
    return group;
}

PyObject* params_key() {
    static PyObject* const interned = PyUnicode_InternFromString("params");
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

void read_hypers(int rule, const py::list& param_groups, std::vector<Hyper>& hypers,
                 std::vector<GroupScalars>* on_device, BeforeCode before_code) {
    const RuleInfo& info = rules()[static_cast<std::size_t>(rule)];
    PyObject* const* const keys = keys_of(rule);
    hypers.clear();
    if (on_device != nullptr) on_device->clear();
    for (std::size_t i = 0; i < param_groups.size(); ++i) {
        // Held, since a conversion may run code that changes the list.
        const auto held = py::reinterpret_borrow<py::object>(group_at(param_groups, i));
        PyObject* const group = held.ptr();
        Values values;
        GroupScalars scalars;
        DeviceNumber* next = scalars.numbers;
        bool found_on_device = false;
        int hyper = 0;
        for (const HyperSpec& spec : info.hypers) {
            PyObject* const key = keys[hyper];
            DeviceNumber* const place = spec.on_device ? next++ : nullptr;
            values[hyper++] = spec.kind == HyperSpec::flag
                                  ? flag_of(group, key, i, before_code)
                                  : number_of(group, key, i, before_code, on_device ? place : nullptr);
            found_on_device |= place != nullptr && place->address != nullptr;
        }
        hypers.push_back(info.hyper(values));
        if (!found_on_device) continue;
        on_device->resize(i + 1);
        on_device->back() = scalars;
    }
    if (on_device != nullptr && !on_device->empty()) on_device->resize(hypers.size());
}

}  // namespace sgdcore::bindings
