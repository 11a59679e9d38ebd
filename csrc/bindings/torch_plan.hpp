// The step over torch tensors: finds each parameter's gradient and momentum and hands a work list to the core.
//
// What is unusual (see `run`) is left to Python code that turns it into the usual.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "../work.hpp"
#include "devices.hpp"
#include "parameter.hpp"
#include "torch_listing.hpp"
#include "torch_reader.hpp"

namespace sgdcore::bindings {

class TorchPlan {
  public:
    /// `rule` is the rule's number.
    TorchPlan(int rule, TorchInterface interface) : rule_(rule), reader_(std::move(interface)) {}

    /// One step over the groups' parameters that have a gradient, with momentum buffers from `state`. Returns false,
    /// with nothing changed, unless every tensor is as usual: of torch's own types, dense memory of a storage type
    /// on the CPU or a CUDA device, each momentum buffer there already and laid out as its parameter, and nothing
    /// overlapping. `grad_factor` multiplies every gradient; `scaling` is DeviceInterface's, or None.
    bool run(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
             const py::object& scaling);

    /// One step over `items`, tuples (parameter, gradient, momentum or None, index of the group, first, address of
    /// TensorRef's pending flags or 0). False as above; `dry_run` goes no further than that. Does not increment
    /// versions.
    bool run_items(const py::object& groups, const py::list& items, double grad_factor, bool dry_run,
                   const py::object& scaling);

    /// Gives these momentum buffers, and no others, flags: tuples (tensor, address).
    void set_pending(const py::list& flags);

    /// True if the elements fill one range of memory, axes in any order.
    bool is_dense(const py::object& tensor);

    /// Whether anyone may hold a reference to the optimizer's state. As long as nobody has asked for it, nobody can
    /// have moved the momentum buffers' memory or recorded one for autograd, so a step need neither read them anew nor
    /// increment their versions.
    bool state_exposed = true;

    int traverse(visitproc visit, void* arg) const;
    void clear();

  private:
    /// A tensor as the last step found it. Between steps nothing here refers to a tensor: what the user lets go is
    /// freed at once, and swap_tensors takes it.
    struct Known {
        TensorIdentity identity;
        const std::byte* data = nullptr;
    };
    /// What is remembered of one parameter, by its position; a cache.
    struct Entry {
        Known parameter, momentum;
        Py_hash_t hash = 0;  // of the parameter: a Python call otherwise
    };
    /// References that a step holds.
    struct References {
        std::vector<PyObject*> params, grads, momenta;

        void release();
    };
    /// What is kept from step to step. A step takes it away from the plan for its time, so that another one, in another
    /// thread or from code that this one calls, finds none and makes its own.
    struct Memory {
        std::vector<Entry> entries;
        std::vector<Hyper> hypers;
        std::vector<GroupScalars> scalars;
        TorchListing listing;
        References held;        // those of a step, which releases them at its end
        bool complete = false;  // the last step found everything as usual
    };
    class Lease;
    class Momenta;
    struct Pass;

    /// Makes the memory's listing the work list of a step; false if something is unusual. The pass's position is then
    /// that of the parameter it came to.
    bool list(Pass& pass, const py::list& param_groups);
    /// Lists the parameter at the pass's position if it has a gradient; false if something is unusual.
    bool list_parameter(Pass& pass, PyObject* parameter, std::uint32_t group);
    /// Reads the momentum buffer of the parameter at the pass's position; false if it is missing or unusual.
    bool read_momentum(Pass& pass, PyObject* parameter);
    /// Reads a tensor; false if it is unusual.
    bool read(PyObject* tensor, Known& known, TorchView& view, std::vector<std::int64_t>& layout) const;
    /// Tells autograd of what a step has written.
    void increment_versions(const References& held, bool with_momenta, bool with_grads) const;
    void update(const Memory& memory, const py::list& param_groups, const StepOptions& options,
                const py::object& scaling, const std::vector<std::uint8_t*>& pending);
    /// The flags of each tensor in the listing; empty if there are none at all.
    std::vector<std::uint8_t*> pending_of(const Memory& memory) const;

    const int rule_;
    TorchReader reader_;
    DeviceSteps device_steps_;
    std::map<PyObject*, std::pair<py::object, std::uint8_t*>> pending_;  // by momentum buffer
    std::unique_ptr<Memory> memory_;                                     // null while a step uses it
};

}  // namespace sgdcore::bindings
