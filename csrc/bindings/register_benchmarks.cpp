// The yardstick of the benchmarks: a step's memory traffic without its arithmetic.
#include <cstdint>
#include <string>

#include "../cpu/memory_pass.hpp"
#include "../cuda/table.hpp"
#include "arrays.hpp"
#include "devices.hpp"
#include "gil.hpp"
#include "module.hpp"

namespace sgdcore::bindings {
namespace {

void require_like_param(const ArrayRef& ref, const ArrayRef& param, const Argument& argument) {
    require_updatable(ref, argument);
    require_same_shape(ref, param, argument);
    require_same_device(ref, param, argument);
    if (ref.dtype != param.dtype) {
        throw py::type_error(argument.text() + ": expected dtype " + dtype_name(param.dtype) +
                             ", the parameter's, got " + dtype_name(ref.dtype));
    }
}

std::int64_t byte_count(const ArrayRef& ref) { return ref.size * static_cast<std::int64_t>(item_size(ref.dtype)); }

std::uint64_t memory_pass(const py::object& param, const py::object& grad, const py::object& state, bool clear) {
    const ArrayRef p = read_array(param, "param"), g = read_array(grad, "grad");
    const ArrayRef b = state.is_none() ? ArrayRef() : read_array(state, "state");
    if (p.device != cpu_device) {
        throw py::value_error("param: expected an array on the CPU, got one on CUDA device " +
                              std::to_string(p.device));
    }
    require_like_param(p, p, "param");
    require_like_param(g, p, "grad");
    if (!b.empty()) require_like_param(b, p, "state");
    const GilRelease release;
    return cpu::memory_pass(p.data, g.data, b.data, byte_count(p), clear);
}

void memory_pass_on_device(const py::object& param, const py::object& grad, const py::object& state,
                           std::uintptr_t stream) {
    const ArrayRef p = read_array(param, "param"), g = read_array(grad, "grad"), b = read_array(state, "state");
    if (p.device == cpu_device) {
        throw py::value_error("param: expected an array on a CUDA device, got one on the CPU");
    }
    const auto check = [&](const ArrayRef& ref, const Argument& argument) {
        require_like_param(ref, p, argument);
        const auto behind = address_of(ref.data) % cuda::vector_bytes;
        if (behind == 0) return;
        throw py::value_error(argument.text() + ": expected an address that is a multiple of " +
                              std::to_string(cuda::vector_bytes) + ", got one that is " + std::to_string(behind) +
                              " bytes behind one");
    };
    check(p, "param");
    check(g, "grad");
    check(b, "state");
    cuda::Runtime& runtime = device_runtime();
    runtime.memory_pass(p.device, runtime.blocks_at_once(p.device),
                        {p.data, b.data, g.data, byte_count(p) / cuda::vector_bytes}, pointer_of<void>(stream));
}

}  // namespace

void register_benchmarks(py::module_& module) {
    module.def("memory_pass", &memory_pass, py::arg("param"), py::arg("grad"), py::arg("state") = py::none(),
               py::arg("clear") = false);
    module.def("memory_pass_on_device", &memory_pass_on_device, py::arg("param"), py::arg("grad"), py::arg("state"),
               py::arg("stream"));
}

}  // namespace sgdcore::bindings
