// NumPy arrays exported and imported as DLPack capsules.
#include "dlpack.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "arrays.hpp"
#include "dlpack_abi.hpp"
#include "gil.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

struct DLManagedTensor {
    static constexpr const char *fresh = "dltensor", *used = "used_dltensor";
    DLTensor tensor;
    void* context;
    void (*deleter)(DLManagedTensor*);
};

struct DLManagedTensorVersioned {
    static constexpr const char *fresh = "dltensor_versioned", *used = "used_dltensor_versioned";
    struct {
        std::uint32_t major, minor;
    } version;
    void* context;
    void (*deleter)(DLManagedTensorVersioned*);
    std::uint64_t flags;
    DLTensor tensor;
};
constexpr std::uint32_t known_major = 1;
constexpr std::uint64_t flag_read_only = 1, flag_copied = 2;

/// Libraries whose arrays may always be written, though their older releases share them in unversioned capsules.
constexpr std::array<std::string_view, 2> writable_libraries{"torch", "cupy"};

/// An exported tensor together with what it points to.
template <class Managed>
struct Export {
    Managed managed{};
    py::array array;
    std::vector<std::int64_t> shape, strides;
};

template <class Managed>
py::capsule export_array(const ArrayRef& ref, DLDevice device) {
    auto owner = std::make_unique<Export<Managed>>();
    owner->array = ref.array;
    for (int axis = 0; axis < ref.array.ndim(); ++axis) {
        owner->shape.push_back(ref.array.shape(axis));
        owner->strides.push_back(ref.array.strides(axis) / ref.array.itemsize());
    }
    Managed& managed = owner->managed;
    managed.context = owner.get();
    managed.deleter = [](Managed* self) {
        if (Py_IsInitialized() == 0) return;  // Python has ended, and with it the array
        const GilAcquire gil;                 // consumers may delete from any thread
        delete static_cast<Export<Managed>*>(self->context);
    };
    managed.tensor = {ref.data,
                      device,
                      static_cast<std::int32_t>(ref.array.ndim()),
                      {ref.dtype == DType::bfloat16 ? code_bfloat : code_float,
                       static_cast<std::uint8_t>(8 * item_size(ref.dtype)), 1},
                      owner->shape.data(),
                      owner->strides.data(),
                      0};
    if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) {
        managed.version = {known_major, 0};
        managed.flags = ref.writable ? 0 : flag_read_only;
    }
    // A consumer renames the capsule. A capsule that nobody took still owns its tensor.
    py::capsule capsule(&managed, Managed::fresh, [](PyObject* self) {
        if (!PyCapsule_IsValid(self, Managed::fresh)) return;
        auto* unclaimed = static_cast<Managed*>(PyCapsule_GetPointer(self, Managed::fresh));
        unclaimed->deleter(unclaimed);
    });
    owner.release();
    return capsule;
}

template <class Managed>
py::array import_capsule(const py::object& capsule, bool writable) {
    auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), Managed::fresh));
    if (managed == nullptr) throw py::error_already_set();
    const DLTensor& tensor = managed->tensor;
    const std::optional<DType> dtype = storage_type(tensor.dtype);
    if (!dtype) {
        throw py::type_error("DLPack tensor: expected float64, float32, float16 or bfloat16, got type code " +
                             std::to_string(tensor.dtype.code) + " of " + std::to_string(tensor.dtype.bits) + " bits");
    }
    const auto item = static_cast<py::ssize_t>(item_size(*dtype));
    std::vector<py::ssize_t> shape(tensor.shape, tensor.shape + tensor.ndim), strides(shape.size());
    py::ssize_t contiguous = item;
    for (std::size_t axis = shape.size(); axis-- > 0;) {
        strides[axis] = tensor.strides == nullptr ? contiguous : tensor.strides[axis] * item;
        contiguous *= shape[axis];
    }
    const py::dtype numpy = numpy_dtype(*dtype);
    // From here on this function releases the memory.
    PyCapsule_SetName(capsule.ptr(), Managed::used);
    const py::capsule owner(managed, [](void* self) {
        auto* taken = static_cast<Managed*>(self);
        if (taken->deleter != nullptr) taken->deleter(taken);
    });
    py::array array(numpy, shape, strides, static_cast<const std::byte*>(tensor.data) + tensor.byte_offset, owner);
    if (!writable) array.attr("setflags")(py::arg("write") = false);
    return array;
}

/// True for an array of one of `writable_libraries`, or of a class derived from theirs.
bool is_known_writable(py::handle object) {
    for (const py::handle base : py::type::of(object).attr("__mro__")) {
        const py::object module = py::getattr(base, "__module__", py::none());
        if (!py::isinstance<py::str>(module)) continue;
        const std::string name = utf8(module);
        const std::string_view library = std::string_view(name).substr(0, name.find('.'));
        if (std::ranges::find(writable_libraries, library) != writable_libraries.end()) return true;
    }
    return false;
}

/// True if writes reach the memory of the producer.
bool may_be_written(const DLManagedTensorVersioned& managed) {
    return (managed.flags & (flag_read_only | flag_copied)) == 0;
}

/// An ndarray over the memory that `object.__dlpack__()` shares, on any device.
py::array import_array(py::handle object, const py::dict& keywords = py::dict()) {
    const py::object share = attribute(object, "__dlpack__");
    py::object capsule;
    try {
        capsule = call(share, py::tuple(), py::dict(**keywords, py::arg("max_version") = py::make_tuple(1, 0)));
    } catch (py::error_already_set& error) {
        if (!error.matches(PyExc_TypeError)) throw;  // producers older than DLPack 1.0 take no max_version
        capsule = call(share, py::tuple(), keywords);
    }
    if (PyCapsule_IsValid(capsule.ptr(), DLManagedTensorVersioned::fresh)) {
        const auto* managed = static_cast<DLManagedTensorVersioned*>(
            PyCapsule_GetPointer(capsule.ptr(), DLManagedTensorVersioned::fresh));
        if (managed->version.major != known_major) {  // the rest has another layout
            throw py::buffer_error("DLPack tensor: expected version " + std::to_string(known_major) + ", got " +
                                   std::to_string(managed->version.major));
        }
        return import_capsule<DLManagedTensorVersioned>(capsule, may_be_written(*managed));
    }
    return import_capsule<DLManagedTensor>(capsule, is_known_writable(object));
}

std::pair<int, int> device_of(py::handle object) {
    return py::cast<std::pair<int, int>>(call(attribute(object, "__dlpack_device__")));
}

}  // namespace

py::capsule to_dlpack(const py::array& array, bool versioned, int device) {
    const ArrayRef ref = read_array(array, "__dlpack__");
    const DLDevice where = device == cpu_device ? DLDevice{device_cpu, 0} : DLDevice{device_cuda, device};
    if (versioned) return export_array<DLManagedTensorVersioned>(ref, where);
    if (!ref.writable) throw py::buffer_error("a read-only array needs a consumer that understands DLPack 1.0");
    return export_array<DLManagedTensor>(ref, where);
}

py::array from_dlpack(py::handle object) {
    const auto [type, number] = device_of(object);
    if (type != device_cpu) {
        throw py::value_error("DLPack tensor: expected memory on the CPU or a CUDA device, got device type " +
                              std::to_string(type));
    }
    return import_array(object);
}

std::pair<py::array, int> from_device_dlpack(py::handle object) {
    constexpr int no_synchronization = -1;
    const auto [type, number] = device_of(object);
    return {import_array(object, py::dict(py::arg("stream") = no_synchronization)), number};
}

}  // namespace sgdcore::bindings
