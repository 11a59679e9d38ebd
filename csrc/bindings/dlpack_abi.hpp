// The DLPack 1.x ABI (https://dmlc.github.io/dlpack/latest/c_api.html). The few structures that are needed are declared
// here, which is less than a dependency.
#pragma once

#include <cstdint>
#include <optional>

#include "../dtypes.hpp"

namespace sgdcore::bindings {

struct DLDevice {
    std::int32_t type, id;
};
inline constexpr std::int32_t device_cpu = 1, device_cuda = 2, device_cuda_managed = 13;

struct DLDataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
inline constexpr std::uint8_t code_int = 0, code_float = 2, code_bfloat = 4;

/// The storage type, if the core has it.
constexpr std::optional<DType> storage_type(const DLDataType& type) {
    if (type.lanes != 1) return std::nullopt;
    if (type.code == code_bfloat && type.bits == 16) return DType::bfloat16;
    if (type.code != code_float) return std::nullopt;
    switch (type.bits) {
        case 64:
            return DType::float64;
        case 32:
            return DType::float32;
        case 16:
            return DType::float16;
        default:
            return std::nullopt;
    }
}

struct DLTensor {
    void* data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null means C order
    std::uint64_t byte_offset;
};

/// A framework's functions that read its tensors from C, the attribute __dlpack_c_exchange_api__ of its tensor type
/// (since DLPack 1.2). Only the function that is called here has its true type.
struct DLPackExchangeAPI {
    static constexpr const char* capsule_name = "dlpack_exchange_api";
    struct {
        std::uint32_t major, minor;
    } version;
    DLPackExchangeAPI* previous;
    void (*managed_tensor_allocator)();
    void (*managed_tensor_from_py_object_no_sync)();
    void (*managed_tensor_to_py_object_no_sync)();
    /// Fills in `out`, which borrows from the tensor. Returns nonzero, with a Python exception set, on failure.
    int (*dltensor_from_py_object_no_sync)(void* tensor, DLTensor* out);
    void (*current_work_stream)();
};

}  // namespace sgdcore::bindings
