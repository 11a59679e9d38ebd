// Reading the dicts of param_groups.
#include "hypers.hpp"

#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
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

/// Raises TypeError; ValueError if an OverflowError is set. An exception that is set becomes the cause.
[[noreturn]] void refuse(const py::object& value, const char* expected, PyObject* key, std::size_t index) {
    const bool caused = PyErr_Occurred() != nullptr;
    if (caused && !PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();  // such as KeyboardInterrupt
    const bool too_large = caused && PyErr_ExceptionMatches(PyExc_OverflowError);
    std::optional<py::error_already_set> cause;
    if (caused) cause.emplace();  // takes the exception: repr must not find one set
    const std::string text = hyper_text(key, index) + ": expected " + expected +
                             (too_large ? " that a float can hold, got " : ", got ") +
                             repr_text(value, too_large ? 80 : std::string::npos);
    if (!caused) throw py::type_error(text);
    py::raise_from(*cause, too_large ? PyExc_ValueError : PyExc_TypeError, text.c_str());
    throw py::error_already_set();
}

/// Sets OverflowError if a finite number became an infinite float, as a large Decimal does.
void require_kept(PyObject* value, double number) {
    if (!std::isinf(number) || PyFloat_Check(value)) return;
    const py::float_ infinity(number);
    const int equal = PyObject_RichCompareBool(value, infinity.ptr(), Py_EQ);
    if (equal == 0) PyErr_SetString(PyExc_OverflowError, "the number is finite and its float is not");
}

/// True for arrays and tensors: a tensor that requires a gradient warns when it is converted otherwise. False for
/// NumPy's scalars, whose item() allocates memory.
bool converts_by_item(const py::object& value) {
    static PyObject* const tensor_mark = PyUnicode_InternFromString("requires_grad");
    return py::isinstance<py::array>(value) ||
           unless_python_ends([&] { return PyObject_HasAttr(value.ptr(), tensor_mark); }) != 0;
}

/// One group as it was read.
struct GroupValues {
    Values values;
    DeviceScalars scalars;
    bool on_device = false;  // one of the numbers is on a device
    bool plain = true;       // all are floats, integers and bools, which never change
    Precision precision = Precision::plain;
    std::uint64_t seed = 0;

    Hyper hyper(const RuleInfo& rule) const {
        Hyper hyper = rule.hyper(values);
        if (precision != Precision::plain) hyper.keep_in(precision, seed);
        return hyper;
    }
};

/// group[key] as a float. If `place` is not null, a number on a device stays there: `place` describes it, and the
/// result is NaN.
double number_of(PyObject* group, PyObject* key, std::size_t index, const BeforeCode& before_code, DeviceScalar* place,
                 bool& plain) {
    PyObject* const item = group_item(group, key, index);
    if (PyFloat_CheckExact(item)) return PyFloat_AS_DOUBLE(item);
    if (!PyLong_CheckExact(item)) {
        plain = false;
        before_code();
    }
    const auto value = py::reinterpret_borrow<py::object>(item);  // what follows may run code that changes the group
    if (place != nullptr && !PyLong_CheckExact(item) && is_on_device(value)) {
        const std::string text = hyper_text(key, index);
        const ArrayRef ref = read_array(value, text.c_str());
        if (ref.size != 1) refuse(value, expected_number, key, index);
        *place = {ref.data, ref.device, ref.dtype};
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

bool flag_of(PyObject* group, PyObject* key, std::size_t index, const BeforeCode& before_code, bool& plain) {
    PyObject* const item = group_item(group, key, index);
    if (item == Py_False || item == Py_True) return item == Py_True;
    plain = false;
    before_code();
    const auto value = py::reinterpret_borrow<py::object>(item);
    const int truth = unless_python_ends([&] { return PyObject_IsTrue(value.ptr()); });
    if (truth < 0) refuse(value, "True or False", key, index);
    return truth != 0;
}

/// group[key], borrowed; null where the group lacks the key or has None there.
PyObject* optional_item(PyObject* group, PyObject* key) {
    PyObject* const item = PyDict_GetItemWithError(group, key);
    if (item == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return item == Py_None ? nullptr : item;
}

/// Reads how a group's parameters are kept.
void read_precision(PyObject* group, std::size_t index, GroupValues& found) {
    static PyObject* const precision_key = PyUnicode_InternFromString("precision");
    static PyObject* const seed_key = PyUnicode_InternFromString("seed");
    PyObject* const item = optional_item(group, precision_key);
    if (item == nullptr) return;
    for (const Precision precision : {Precision::split, Precision::kahan, Precision::stochastic}) {
        if (PyUnicode_Check(item) && PyUnicode_CompareWithASCIIString(item, precision_name(precision)) == 0) {
            found.precision = precision;
        }
    }
    if (found.precision == Precision::plain) {
        throw py::value_error(hyper_text(precision_key, index) +
                              ": expected 'split', 'kahan', 'stochastic' or None, got " + repr_text(item));
    }
    PyObject* const seed = found.precision == Precision::stochastic ? optional_item(group, seed_key) : nullptr;
    if (seed == nullptr) return;
    found.seed = PyLong_Check(seed) ? PyLong_AsUnsignedLongLong(seed) : 0;
    if (PyErr_Occurred() || !PyLong_Check(seed)) {
        PyErr_Clear();
        throw py::value_error(hyper_text(seed_key, index) + ": expected an integer from 0 to 2**64 - 1, got " +
                              repr_text(seed));
    }
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

/// Reads a group. If `leave_on_device`, the numbers that a device may read stay there.
GroupValues read_group(int rule, PyObject* group, std::size_t index, bool leave_on_device,
                       const BeforeCode& before_code) {
    PyObject* const* const keys = keys_of(rule);
    GroupValues found;
    DeviceScalar* next = found.scalars.of;
    int hyper = 0;
    for (const HyperSpec& spec : rules()[static_cast<std::size_t>(rule)].hypers) {
        PyObject* const key = keys[hyper];
        DeviceScalar* const place = spec.on_device ? next++ : nullptr;
        found.values[hyper++] =
            spec.kind == HyperSpec::flag || spec.kind == HyperSpec::mode
                ? flag_of(group, key, index, before_code, found.plain)
                : number_of(group, key, index, before_code, leave_on_device ? place : nullptr, found.plain);
        found.on_device |= place != nullptr && place->address != nullptr;
    }
    read_precision(group, index, found);
    return found;
}

/// A number that differs from dict to dict and changes with each change of a dict; 0 where CPython keeps none.
std::uint64_t version_of([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000 && !defined(PYPY_VERSION)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
    return 0;
#endif
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

void GroupHypers::read(int rule, const py::list& param_groups, BeforeCode before_code) {
    on_device_.clear();
    std::size_t i = 0;
    for (; i < param_groups.size(); ++i) {
        PyObject* const group = group_at(param_groups, i);
        if (i == all_.size()) {
            all_.emplace_back();
            seen_.emplace_back();
        }
        const Seen now{group, version_of(group)};
        if (now.version != 0 && now.version == seen_[i].version && now.dict == seen_[i].dict) continue;
        seen_[i] = {};
        // Held, since a conversion may run code that changes the list.
        const auto held = py::reinterpret_borrow<py::object>(group);
        const GroupValues found = read_group(rule, group, i, true, before_code);
        const RuleInfo& info = rules()[static_cast<std::size_t>(rule)];
        all_[i] = found.hyper(info);
        if (info.counts) {
            given_.resize(all_.size());
            given_[i] = found.values;
        }
        if (found.plain) seen_[i] = now;
        may_have_precisions_ = may_have_precisions_ || found.precision != Precision::plain;
        if (!found.on_device) continue;
        on_device_.resize(i + 1);
        on_device_.back() = found.scalars;
    }
    all_.resize(i);
    seen_.resize(i);
    if (!on_device_.empty()) on_device_.resize(i);
}

void GroupHypers::require_steps(int rule) const {
    const auto refusal = rules()[static_cast<std::size_t>(rule)].refusal;
    if (refusal == nullptr) return;
    for (std::size_t i = 0; i < all_.size(); ++i) {
        if (const char* const text = refusal(all_[i].values)) {
            throw std::runtime_error("param_groups[" + std::to_string(i) + "]: " + text);
        }
    }
}

void GroupHypers::finish_step(int rule, const py::list& param_groups) {
    const RuleInfo& info = rules()[static_cast<std::size_t>(rule)];
    if (!info.counts) return;
    for (std::size_t i = 0; i < all_.size() && i < param_groups.size(); ++i) {
        PyObject* const group = group_at(param_groups, i);
        const Seen now{group, version_of(group)};
        const bool unchanged = now.version != 0 && now.version == seen_[i].version && now.dict == seen_[i].dict;
        int hyper = -1;
        for (const HyperSpec& spec : info.hypers) {
            ++hyper;
            if (spec.kind != HyperSpec::count && spec.kind != HyperSpec::sum) continue;
            const double number = all_[i].values[hyper];
            if (number == given_[i][hyper]) continue;
            const py::object value = spec.kind == HyperSpec::count
                                         ? py::object(py::int_(static_cast<std::int64_t>(number)))
                                         : py::object(py::float_(number));
            if (PyDict_SetItem(group, keys_of(rule)[hyper], value.ptr()) != 0) throw py::error_already_set();
            given_[i][hyper] = number;
        }
        // The dict holds what is known already: it need not be read again.
        seen_[i] = unchanged ? Seen{group, version_of(group)} : Seen{};
        if (!unchanged) continue;
        Hyper next = info.hyper(given_[i]);
        next.keep_in(all_[i].precision, all_[i].seed);
        all_[i] = next;
    }
}

std::vector<Hyper> read_hypers_on_host(int rule, const py::list& param_groups) {
    std::vector<Hyper> hypers;
    for (std::size_t i = 0; i < param_groups.size(); ++i) {
        const auto held = py::reinterpret_borrow<py::object>(group_at(param_groups, i));
        hypers.push_back(read_group(rule, held.ptr(), i, false, {}).hyper(rules()[static_cast<std::size_t>(rule)]));
    }
    return hypers;
}

}  // namespace sgdcore::bindings
