// The CPU kernels: the loop around the rule, instantiated for every storage type and variant. The build compiles
// this file once per instruction set with SGDCORE_KERNEL_TABLE naming the table it defines.
//
// The compiler vectorises the plain loop, tail included. Only the table leaves this file: everything else is
// in an anonymous namespace or always_inline.
#include "kernel.hpp"

#include <bit>
#include <type_traits>
#include <utility>

namespace sgdcore::cpu {
namespace {

/// Updates the elements two by two, as the halves of 32-bit words: a half is a float32 after one shift or mask, where
/// single 16-bit elements have to be widened and packed again across the lanes of a vector. On one thread of a Zen 3
/// machine a step over 16M elements took 7.3 ms instead of 10.7. Returns the number of elements updated, all but an
/// odd last one.
template <SgdVariant variant>
SGDCORE_INLINE std::int64_t update_bfloat16_pairs(const SgdRule<float, variant>& rule,
                                                  std::byte* SGDCORE_RESTRICT param,
                                                  const std::byte* SGDCORE_RESTRICT grad,
                                                  std::byte* SGDCORE_RESTRICT momentum, std::int64_t size) {
    static_assert(std::endian::native == std::endian::little);
    // Only a NaN among the coefficients could bring one whose bits rounded_bits does not keep.
    const float coefficients = rule.negative_lr + rule.momentum + rule.one_minus_dampening + rule.weight_decay;
    if (coefficients != coefficients) return 0;
    using storage::BFloat16;
    using Words = Unaligned<std::uint32_t>;
    const auto low = [](std::uint32_t word) { return bits_as<float>(word << 16); };
    const auto high = [](std::uint32_t word) { return bits_as<float>(word & 0xffff0000u); };
    const auto join = [](float first, float second) {
        return (BFloat16::rounded_bits(first) >> 16) | (BFloat16::rounded_bits(second) & 0xffff0000u);
    };
    auto* const params = reinterpret_cast<Words*>(param);
    const auto* const grads = reinterpret_cast<const Words*>(grad);
    auto* const momenta = reinterpret_cast<Words*>(momentum);
    const auto loop = [&](const SgdRule<float, variant> known) SGDCORE_INLINE_LAMBDA {
        for (std::int64_t i = 0; i < size / 2; ++i) {
            const std::uint32_t p = params[i].value, g = grads[i].value;
            const std::uint32_t b = variant.momentum == Momentum::running ? momenta[i].value : 0;
            float p_low = low(p), p_high = high(p), b_low = low(b), b_high = high(b);
            known(p_low, low(g), b_low);
            known(p_high, high(g), b_high);
            if constexpr (variant.momentum != Momentum::none) momenta[i].value = join(b_low, b_high);
            params[i].value = join(p_low, p_high);
        }
    };
    if (rule.flip == 0) {
        SgdRule<float, variant> descent = rule;
        descent.flip = 0;  // known to the compiler: every instruction counts here
        loop(descent);
    } else {
        loop(rule);
    }
    return size / 2 * 2;
}

constexpr std::int64_t lanes = 8;  // of the conversions in platform.hpp

template <class Storage>
SGDCORE_INLINE void load_lanes(const std::byte* base, std::int64_t index, float* values) {
    if constexpr (Storage::dtype == DType::float16) {
        float16_to_float32(base + index * 2, values);
    } else {
        for (std::int64_t lane = 0; lane < lanes; ++lane)
            values[lane] = storage::load<Storage, float>(base, index + lane);
    }
}

template <class Storage>
SGDCORE_INLINE void store_lanes(std::byte* base, std::int64_t index, const float* values) {
    if constexpr (Storage::dtype == DType::float16) {
        float32_to_float16(values, base + index * 2);
    } else {
        for (std::int64_t lane = 0; lane < lanes; ++lane) storage::store<Storage>(base, index + lane, values[lane]);
    }
}

/// Updates eight elements at a time, with the machine's own conversions of float16, which the compiler does not find in
/// the plain loop. Returns the number of elements updated, all but the last few.
template <class ParamStorage, class GradStorage, class MomentumStorage, SgdVariant variant>
SGDCORE_INLINE std::int64_t update_lanes(const SgdRule<float, variant>& rule, std::byte* SGDCORE_RESTRICT param,
                                         const std::byte* SGDCORE_RESTRICT grad, std::byte* SGDCORE_RESTRICT momentum,
                                         std::int64_t size) {
    std::int64_t i = 0;
    for (; i + lanes <= size; i += lanes) {
        float p[lanes], g[lanes], b[lanes] = {};
        load_lanes<ParamStorage>(param, i, p);
        load_lanes<GradStorage>(grad, i, g);
        if constexpr (variant.momentum == Momentum::running) load_lanes<MomentumStorage>(momentum, i, b);
        for (std::int64_t lane = 0; lane < lanes; ++lane) rule(p[lane], g[lane], b[lane]);
        if constexpr (variant.momentum != Momentum::none) store_lanes<MomentumStorage>(momentum, i, b);
        store_lanes<ParamStorage>(param, i, p);
    }
    return i;
}

template <class ParamStorage, class GradStorage, class MomentumStorage, SgdVariant variant>
SGDCORE_INLINE void update_elements(std::byte* SGDCORE_RESTRICT param, const std::byte* SGDCORE_RESTRICT grad,
                                    std::byte* SGDCORE_RESTRICT momentum, std::int64_t size, const SgdHyper& hyper) {
    using C = storage::ComputeType<ParamStorage, GradStorage, MomentumStorage>;
    const SgdRule<C, variant> rule(hyper);
    std::int64_t i = 0;
    if constexpr (ParamStorage::dtype == DType::bfloat16 && GradStorage::dtype == DType::bfloat16 &&
                  MomentumStorage::dtype == DType::bfloat16) {
        i = update_bfloat16_pairs(rule, param, grad, momentum, size);
    } else if constexpr (converts_float16 && sizeof(C) == sizeof(float) &&
                         (ParamStorage::dtype == DType::float16 || GradStorage::dtype == DType::float16 ||
                          MomentumStorage::dtype == DType::float16)) {
        i = update_lanes<ParamStorage, GradStorage, MomentumStorage>(rule, param, grad, momentum, size);
    }
    for (; i < size; ++i) {
        C p = storage::load<ParamStorage, C>(param, i);
        C b{};
        if constexpr (variant.momentum == Momentum::running) b = storage::load<MomentumStorage, C>(momentum, i);
        rule(p, storage::load<GradStorage, C>(grad, i), b);
        if constexpr (variant.momentum != Momentum::none) storage::store<MomentumStorage>(momentum, i, b);
        storage::store<ParamStorage>(param, i, p);
    }
}

template <class ParamStorage, class GradStorage, class MomentumStorage, SgdVariant variant>
void update(std::byte* param, const std::byte* grad, std::byte* momentum, std::int64_t size, const SgdHyper& hyper) {
    update_elements<ParamStorage, GradStorage, MomentumStorage, variant>(param, grad, momentum, size, hyper);
}

template <class ParamStorage, class GradStorage, class MomentumStorage, SgdVariant variant>
SGDCORE_WIDE_VECTORS void update_wide(std::byte* param, const std::byte* grad, std::byte* momentum, std::int64_t size,
                                      const SgdHyper& hyper) {
    update_elements<ParamStorage, GradStorage, MomentumStorage, variant>(param, grad, momentum, size, hyper);
}

/// Where memory alone is the limit, wide vectors only cost (see CMakeLists.txt). Conversions of 16-bit storage are
/// worth them: a bfloat16 step over 64M elements on one thread of a Zen 4 machine took 13.3 ms with them, 14.7 without.
template <class ParamStorage, class GradStorage, class MomentumStorage, SgdVariant variant>
constexpr Kernel choose() {
    constexpr bool converts = item_size(ParamStorage::dtype) == 2 || item_size(GradStorage::dtype) == 2 ||
                              item_size(MomentumStorage::dtype) == 2;
    return converts ? update_wide<ParamStorage, GradStorage, MomentumStorage, variant>
                    : update<ParamStorage, GradStorage, MomentumStorage, variant>;
}

template <bool has_momentum, bool clear>
SGDCORE_INLINE std::uint64_t pass(std::byte* SGDCORE_RESTRICT param, std::byte* SGDCORE_RESTRICT grad,
                                  std::byte* SGDCORE_RESTRICT momentum, std::int64_t size) {
    using Words = Unaligned<std::uint64_t>;
    auto* const params = reinterpret_cast<Words*>(param);
    auto* const grads = reinterpret_cast<Words*>(grad);
    auto* const momenta = reinterpret_cast<Words*>(momentum);
    std::uint64_t check = 0;
    for (std::int64_t i = 0; i < size / static_cast<std::int64_t>(sizeof(Words)); ++i) {
        const std::uint64_t p = params[i].value, g = grads[i].value;
        if constexpr (has_momentum) {
            params[i].value = momenta[i].value;
            momenta[i].value = p;
            check ^= g;
        } else {
            params[i].value = p ^ g;
        }
        if constexpr (clear) grads[i].value = 0;
    }
    return check;
}

std::uint64_t memory_pass(std::byte* param, std::byte* grad, std::byte* momentum, std::int64_t size, bool clear) {
    if (momentum != nullptr) {
        return clear ? pass<true, true>(param, grad, momentum, size) : pass<true, false>(param, grad, momentum, size);
    }
    return clear ? pass<false, true>(param, grad, nullptr, size) : pass<false, false>(param, grad, nullptr, size);
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
        return choose<Param, Grad, Param, SgdVariant{Momentum::none, false, variant.weight_decay}>();
    } else {
        return choose<Param, Grad, StorageOf<static_cast<DType>(dtypes % dtype_count)>, variant>();
    }
}

template <int... index>
constexpr KernelTable make_table(std::integer_sequence<int, index...>) {
    return {{kernel_at<index>()...}, memory_pass};
}

}  // namespace

extern const KernelTable SGDCORE_KERNEL_TABLE;
constinit const KernelTable SGDCORE_KERNEL_TABLE = make_table(std::make_integer_sequence<int, KernelTable::size>{});

}  // namespace sgdcore::cpu
