// Aligned memory, and its exchange with other libraries.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "../buffer.hpp"
#include "../huge_pages.hpp"
#include "arrays.hpp"
#include "dlpack.hpp"
#include "gil.hpp"
#include "module.hpp"

namespace sgdcore::bindings {
namespace {

/// A zero-filled 1-d array. The array and every view of it keep the allocation alive.
py::array allocate(py::ssize_t size, const py::dtype& dtype) {
    if (size < 0 || size > PY_SSIZE_T_MAX / dtype.itemsize()) throw std::bad_alloc();
    auto buffer = std::make_unique<AlignedBuffer>(static_cast<std::size_t>(size * dtype.itemsize()));
    const void* data = buffer->data();
    const py::capsule owner(buffer.release(), [](void* self) { delete static_cast<AlignedBuffer*>(self); });
    return py::array(dtype, {size}, {dtype.itemsize()}, data, owner);
}

}  // namespace

void register_buffer(py::module_& module) {
    module.attr("alignment") = AlignedBuffer::alignment;
    module.attr("huge_page") = huge_page;
    module.def("allocate", &allocate, py::arg("size"), py::arg("dtype"));
    module.def(
        "advise_huge_pages",
        [](std::uintptr_t address, std::size_t size) { advise_huge_pages(reinterpret_cast<void*>(address), size); },
        py::arg("address"), py::arg("size"));
    module.def(
        "collapse_huge_pages",
        [](const std::vector<std::pair<std::uintptr_t, std::size_t>>& arrays) {
            const GilRelease release;
            std::vector<Extent> ranges;
            for (const auto& [address, size] : arrays) ranges.push_back({address, address + size});
            collapse_huge_pages(std::move(ranges));
        },
        py::arg("arrays"));
    module.def("to_dlpack", &to_dlpack, py::arg("array"), py::arg("versioned"), py::arg("device") = cpu_device);
    module.def("from_dlpack", &from_dlpack, py::arg("object"));
}

}  // namespace sgdcore::bindings
