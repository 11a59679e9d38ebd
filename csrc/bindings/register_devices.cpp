// Devices: the runtime, which another module brings, its properties, and memory for arrays on devices.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../cuda/runtime.hpp"
#include "arrays.hpp"
#include "devices.hpp"
#include "gil.hpp"
#include "module.hpp"

namespace sgdcore::bindings {
namespace {

/// Memory of a device.
class DeviceMemory {
  public:
    /// Uninitialized, or filled with zeros; the constructor waits for that, so that any stream may use the memory.
    DeviceMemory(std::size_t size, int device, bool zeros) : runtime_(device_runtime()), device_(device), size_(size) {
        const int count = runtime_.device_count();
        if (device < 0 || device >= count) {
            throw py::value_error("device: expected a number below " + std::to_string(count) +
                                  ", the number of devices, got " + std::to_string(device));
        }
        memory_ = runtime_.allocate(device, size > 0 ? size : 1);
        if (!zeros) return;
        try {
            runtime_.fill(device, memory_, 0, size, nullptr);
            runtime_.synchronize(device, nullptr);
        } catch (...) {
            runtime_.free(device, memory_);
            throw;
        }
    }
    ~DeviceMemory() { runtime_.free(device_, memory_); }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(memory_); }
    int device() const { return device_; }
    std::size_t size() const { return size_; }

  private:
    cuda::Runtime& runtime_;
    int device_;
    std::size_t size_;
    std::byte* memory_ = nullptr;
};

/// Copies between dense arrays of one dtype and memory order, at least one of them on the device, and waits.
void copy_array(const py::array& to, const py::array& from, int device, std::uintptr_t stream) {
    if (to.nbytes() != from.nbytes()) {
        throw py::value_error("source: expected " + std::to_string(to.nbytes()) + " bytes, as `to` has, got " +
                              std::to_string(from.nbytes()));
    }
    cuda::Runtime& runtime = device_runtime();
    const auto size = static_cast<std::size_t>(to.nbytes());
    void* const target = const_cast<void*>(to.data());
    const void* const source = from.data();
    const GilRelease release;
    runtime.copy(device, target, source, size, pointer_of<void>(stream));
    runtime.synchronize(device, pointer_of<void>(stream));
}

}  // namespace

void register_devices(py::module_& module) {
    py::register_exception<cuda::CudaError>(module, "CudaError", PyExc_RuntimeError);
    module.def(
        "use_runtime",
        [](const py::object& capsule) {  // None: there is no runtime any longer
            void* pointer = nullptr;
            if (!capsule.is_none()) {
                pointer = PyCapsule_GetPointer(capsule.ptr(), cuda::Runtime::capsule_name);
                if (pointer == nullptr) throw py::error_already_set();
            }
            use_device_runtime(static_cast<cuda::Runtime*>(pointer));
        },
        py::arg("capsule"));
    module.def("has_runtime", &has_device_runtime);
    module.attr("cpu_device") = cpu_device;
    module.attr("chunk_size") = chunk_size;
    module.attr("max_slots") = max_slots;
    module.def("device_count", [] { return device_runtime().device_count(); });
    module.def("device_name", [](int device) { return device_runtime().device_name(device); }, py::arg("device"));
    module.def("is_on_device", [](const py::object& object) { return is_on_device(object); }, py::arg("object"));
    py::class_<DeviceMemory>(module, "DeviceMemory")
        .def(py::init<std::size_t, int, bool>(), py::arg("size"), py::arg("device"), py::arg("zeros"))
        .def_property_readonly("address", &DeviceMemory::address)
        .def_property_readonly("device", &DeviceMemory::device)
        .def_property_readonly("size", &DeviceMemory::size);
    module.def(
        "describe_memory",
        [](std::uintptr_t address, const py::dtype& dtype, const std::vector<py::ssize_t>& shape,
           const py::object& owner) { return py::array(dtype, shape, pointer_of<const std::byte>(address), owner); },
        py::arg("address"), py::arg("dtype"), py::arg("shape"), py::arg("owner"));
    module.def("copy_array", &copy_array, py::arg("to"), py::arg("source"), py::arg("device"), py::arg("stream"));
    module.def(
        "fill_zero",
        [](const py::array& array, int device, std::uintptr_t stream) {
            device_runtime().fill(device, const_cast<void*>(array.data()), 0, static_cast<std::size_t>(array.nbytes()),
                                  pointer_of<void>(stream));
        },
        py::arg("array"), py::arg("device"), py::arg("stream"));
}

}  // namespace sgdcore::bindings
