// Hyperparameters as users keep them, in the dicts of param_groups; a step reads the dicts that have changed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../dtypes.hpp"
#include "../work.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

/// The key "params" of a parameter group, interned.
PyObject* params_key();

/// param_groups[index], borrowed. Raises TypeError if it is no dict.
PyObject* group_at(const py::list& param_groups, std::size_t index);

/// group[key], borrowed. Raises KeyError that names the group by its index.
PyObject* group_item(PyObject* group, PyObject* key, std::size_t index);

/// A number in a device's memory; `address` is null where there is none.
struct DeviceNumber {
    const std::byte* address = nullptr;
    DType dtype = DType::float32;
    int device = -1;
};

/// A group's numbers on devices: the i-th is that of the i-th hyperparameter that the rule lets a device read.
struct GroupScalars {
    DeviceNumber numbers[max_device_hypers];
};

/// What is to be done before Python code runs; nothing where `function` is null.
struct BeforeCode {
    void (*function)(void* context) = nullptr;
    void* context = nullptr;

    void operator()() const {
        if (function != nullptr) function(context);
    }
};

/// The hyperparameters of the groups, as the last `read` found them.
class GroupHypers {
  public:
    /// Reads the groups in order, as the rule declares their hyperparameters. A number may be a float, whatever
    /// converts to one, or an array of one element. Raises TypeError or KeyError naming group and key.
    ///
    /// A number on a device stays there, and NaN stands for it. A dict of plain numbers that has not changed since the
    /// last `read` is not read again, so that `rule` has to be the same each time.
    ///
    /// `before_code` is called before anything that may run Python code, if it is not empty; possibly more than once.
    void read(int rule, const py::list& param_groups, BeforeCode before_code = {});

    const std::vector<Hyper>& all() const { return all_; }
    const Hyper& operator[](std::size_t group) const { return all_[group]; }
    std::size_t size() const { return all_.size(); }
    /// The numbers on devices: one entry per group, or none at all.
    const std::vector<GroupScalars>& on_device() const { return on_device_; }

    void reserve(std::size_t groups) {
        all_.reserve(groups);
        seen_.reserve(groups);
    }

  private:
    /// The dict of a group, which is only compared, and its version; 0 where it has to be read again.
    struct Seen {
        PyObject* dict = nullptr;
        std::uint64_t version = 0;
    };

    std::vector<Hyper> all_;
    std::vector<Seen> seen_;
    std::vector<GroupScalars> on_device_;
};

/// The hyperparameters of the groups, with numbers on devices, which are waited for.
std::vector<Hyper> read_hypers_on_host(int rule, const py::list& param_groups);

}  // namespace sgdcore::bindings
