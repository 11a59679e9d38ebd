// Hyperparameters, which users keep in the dicts of param_groups. A step reads the dicts that have changed.
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

/// param_groups[index], borrowed. Raises TypeError if the group is no dict.
PyObject* group_at(const py::list& param_groups, std::size_t index);

/// group[key], borrowed. Raises KeyError, which names the group by its index.
PyObject* group_item(PyObject* group, PyObject* key, std::size_t index);

/// A function to call before Python code runs; nothing is called where it is null.
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
    /// Reads the hyperparameters that the rule declares, group by group. A number may be a float, an object that
    /// converts to one, or an array of one element. Raises TypeError or KeyError, which name group and key.
    ///
    /// A number on a device stays there, and its value is NaN. A dict of plain numbers that has not changed since the
    /// last `read` is not read again, so `rule` must be the same each time.
    ///
    /// `before_code` is called before anything that may run Python code, possibly more than once.
    void read(int rule, const py::list& param_groups, BeforeCode before_code = {});

    /// Raises RuntimeError if a group's values, as `read` found them, allow no step of the rule.
    void require_steps(int rule) const;

    /// Writes the rule's counts and sums to the groups that `read` has read, as they are after a step.
    void finish_step(int rule, const py::list& param_groups);

    const std::vector<Hyper>& all() const { return all_; }
    const Hyper& operator[](std::size_t group) const { return all_[group]; }
    std::size_t size() const { return all_.size(); }
    /// False if no group had a precision so far.
    bool may_have_precisions() const { return may_have_precisions_; }
    /// The hyperparameters on devices: one entry for each group, or none at all.
    const std::vector<DeviceScalars>& on_device() const { return on_device_; }

    void reserve(std::size_t groups) {
        all_.reserve(groups);
        seen_.reserve(groups);
    }

  private:
    /// The dict of a group, which is only compared, and its version; 0 where the dict has to be read again.
    struct Seen {
        PyObject* dict = nullptr;
        std::uint64_t version = 0;
    };

    std::vector<Hyper> all_;
    std::vector<Values> given_;  // of a rule with counts: as they were before the rule scheduled them
    std::vector<Seen> seen_;
    std::vector<DeviceScalars> on_device_;
    bool may_have_precisions_ = false;
};

/// The hyperparameters of the groups. Waits for numbers on devices.
std::vector<Hyper> read_hypers_on_host(int rule, const py::list& param_groups);

}  // namespace sgdcore::bindings
