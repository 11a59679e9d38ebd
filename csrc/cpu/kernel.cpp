// The CPU kernels: the loop around the rule, instantiated for every storage type and variant. The build compiles
// this file once per instruction set with SGDCORE_KERNEL_TABLE naming the table it defines.
//
// The compiler vectorises the plain loop, tail included. Only the table leaves this file: everything else is
// in an anonymous namespace or always_inline.
#include "kernel.hpp"

#include <type_traits>
#include <utility>

namespace sgdcore::cpu {
namespace {

template <class ParamStorage, class GradStorage, class MomentumStorage, SgdVariant variant>
void update(std::byte* SGDCORE_RESTRICT param, const std::byte* SGDCORE_RESTRICT grad,
            std::byte* SGDCORE_RESTRICT momentum, std::int64_t size, const SgdHyper& hyper) {
    using C = storage::ComputeType<ParamStorage, GradStorage, MomentumStorage>;
    const SgdRule<C, variant> rule(hyper);
    for (std::int64_t i = 0; i < size; ++i) {
        C p = storage::load<ParamStorage, C>(param, i);
        C b{};
        if constexpr (variant.momentum == Momentum::running) b = storage::load<MomentumStorage, C>(momentum, i);
        rule(p, storage::load<GradStorage, C>(grad, i), b);
        if constexpr (variant.momentum != Momentum::none) storage::store<MomentumStorage>(momentum, i, b);
        storage::store<ParamStorage>(param, i, p);
    }
}

template <DType dtype>
using StorageOf = std::conditional_t<
    dtype == DType::float64, storage::Float64,
    std::conditional_t<dtype == DType::float32, storage::Float32,
                       std::conditional_t<dtype == DType::float16, storage::Float16, storage::BFloat16>>>;

/// The kernel at `index` of the table; the inverse of KernelTable::find.
template <int index>
constexpr Kernel kernel_at() {
    constexpr SgdVariant variant = SgdVariant::at(index % SgdVariant::count);
    constexpr int dtypes = index / SgdVariant::count;
    using Param = StorageOf<static_cast<DType>(dtypes / dtype_count / dtype_count)>;
    using Grad = StorageOf<static_cast<DType>(dtypes / dtype_count % dtype_count)>;
    if constexpr (variant.momentum == Momentum::none) {
        // One instance for all four momentum types and both values of nesterov, which play no part.
        return update<Param, Grad, Param, SgdVariant{Momentum::none, false, variant.weight_decay}>;
    } else {
        return update<Param, Grad, StorageOf<static_cast<DType>(dtypes % dtype_count)>, variant>;
    }
}

template <int... index>
constexpr KernelTable make_table(std::integer_sequence<int, index...>) {
    return {{kernel_at<index>()...}};
}

}  // namespace

extern const KernelTable SGDCORE_KERNEL_TABLE;
constinit const KernelTable SGDCORE_KERNEL_TABLE = make_table(std::make_integer_sequence<int, KernelTable::size>{});

}  // namespace sgdcore::cpu
