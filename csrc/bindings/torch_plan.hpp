// The step over torch tensors: reads pointers from tensors and hands a work list to the core.
//
// torch's C++ library is not linked. Tensors are read through the DLPack C exchange API, or through a Python function
// where torch does not have it. What is unusual (see `run`) is left to Python code that turns it into the usual.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "../work.hpp"
#include "arrays.hpp"
#include "dlpack_abi.hpp"
#include "parameter.hpp"

namespace sgdcore::bindings {

/// What to know of torch, from the Python side.
struct TorchInterface {
    py::object exchange_api;  // capsule, or None
    /// describe(tensor) -> (address, shape, strides, dtype's name), or None for what is not plain memory; used without
    /// exchange_api.
    py::object describe;
    py::object increment_version;  // of a list of tensors
    /// pin(tensor) -> an object that holds a C++ reference to the tensor, or None; see Entry.
    py::object pin;
    py::object is_negated;  // of a tensor: the elements in memory have the opposite sign
    py::object tensor_type, parameter_type, grad_descriptor;
};

class TorchPlan {
  public:
    explicit TorchPlan(TorchInterface interface);

    /// One step over the groups' parameters that have a gradient, with momentum buffers from `state`. Returns false,
    /// with nothing changed, unless every tensor is as usual: of torch's own types, dense memory of a storage type
    /// on the CPU, each momentum buffer there already and laid out as its parameter, and nothing overlapping.
    /// `grad_factor` multiplies every gradient.
    bool run(const py::list& param_groups, const py::object& state, bool zero_grad, double grad_factor);

    /// One step over `items`, tuples (parameter, gradient, momentum or None, index of the group, first). False as
    /// above; `dry_run` goes no further than that. Does not increment versions.
    bool run_items(const py::list& param_groups, const py::list& items, double grad_factor, bool dry_run);

    /// True if the elements fill one range of memory, axes in any order.
    bool is_dense(const py::object& tensor);

    /// Forgets the pins until the next step. They hide the parameters from the garbage collector, which could not
    /// collect cycles that lead through a parameter and back to the optimizer.
    void unpin();

    int traverse(visitproc visit, void* arg) const;
    void clear();

  private:
    /// What is remembered of one parameter, by its position. All of it only saves time.
    ///
    /// A tensor that only Python refers to costs 30 ns more each time its memory or version is asked for (torch
    /// >= 2.10: passing from one C++ reference to two takes a Python reference, and back). A pin is such a second
    /// reference.
    struct Entry {
        py::object parameter, parameter_pin, momentum, momentum_pin;
        Py_hash_t hash = 0;  // of the parameter: a Python call otherwise
    };
    struct View {
        std::byte* data;
        DType dtype;
        int dimensions;
        const std::int64_t *shape, *strides;  // strides in elements
        std::int64_t size;
    };
    struct Range {
        std::uintptr_t begin, end;
        bool written;
        bool operator==(const Range&) const = default;
    };
    /// Refilled by every step; its capacity is kept.
    struct Scratch {
        std::vector<SgdHyper> hypers;
        std::vector<TensorRef> tensors;
        std::vector<Axis> axes;
        std::vector<std::size_t> axes_end;  // per tensor, into `axes`
        std::vector<Range> ranges;
        std::vector<py::object> grads;
        std::vector<py::object> changed;                 // what the step writes to
        std::vector<std::vector<std::int64_t>> numbers;  // shapes and strides of described tensors
        std::int64_t total = 0;
        void clear();
    };

    bool view(Scratch& scratch, PyObject* tensor, View& view) const;
    bool described(Scratch& scratch, PyObject* tensor, View& view) const;
    bool add(Scratch& scratch, PyObject* parameter, PyObject* grad, PyObject* momentum, std::uint32_t group,
             bool first);
    bool disjoint(const Scratch& scratch, bool zero_grad);
    void update(Scratch& scratch, const StepOptions& options);
    /// Makes entries_[position] that of the parameter. These return false for a negated tensor.
    bool remember(std::size_t position, PyObject* parameter);
    bool remember_momentum(std::size_t position, PyObject* momentum);
    py::list list_of(const std::vector<py::object>& tensors);
    py::object pin(PyObject* tensor) const;
    bool is_negated(PyObject* tensor) const;
    std::unique_ptr<Scratch> take_scratch();

    TorchInterface interface_;
    const DLPackExchangeAPI* exchange_ = nullptr;
    PyGetSetDef* grad_getter_ = nullptr;
    PyTypeObject *tensor_type_, *parameter_type_;
    py::object changed_;  // the list last passed to increment_version
    std::vector<Entry> entries_;
    bool unpinned_ = false;             // the entries are to be made anew
    std::unique_ptr<Scratch> scratch_;  // null while a step uses it
    // The ranges of memory last found to be disjoint.
    std::vector<Range> checked_;
    bool checked_zero_grad_ = false;
    std::vector<Range> sorted_;
};

}  // namespace sgdcore::bindings
