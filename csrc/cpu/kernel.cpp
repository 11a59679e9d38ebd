// The CPU kernels: the loop around the rules, and the conversions of storage types. The build compiles this file once
// per instruction set with SGDCORE_KERNEL_TABLE naming the table it defines.
//
// The compiler vectorises the plain loop, tail included. Only the table is visible outside of this file: all else is in
// an anonymous namespace or always_inline.
#include "kernel.hpp"

#include "../rules/average.hpp"

#include <bit>
#include <type_traits>
#include <utility>

namespace sgdcore::cpu {
namespace {

/// Calls `function(i)` for each state, with its number as a constant.
template <int count, class Function>
SGDCORE_INLINE void for_each_state(Function function) {
    [&]<int... i>(std::integer_sequence<int, i...>) SGDCORE_INLINE_LAMBDA {
        (function(std::integral_constant<int, i>{}), ...);
    }(std::make_integer_sequence<int, count>{});
}

constexpr std::int64_t lanes = float16_lanes;

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

/// The loops of one kernel: a rule's variant over arrays of these storage types.
template <class R, typename R::Variant variant, class ParamStorage, class GradStorage, class StateStorage>
struct Loops {
    using C = storage::ComputeType<ParamStorage, GradStorage, StateStorage>;
    using Coefficients = typename R::template Coefficients<C>;
    static constexpr int states = state_count<R>;
    static constexpr bool reads(int state) { return R::use(variant, state) == Use::update; }
    static constexpr bool writes(int state) { return R::use(variant, state) != Use::none; }

    // Only parameters of a function can be `restrict`, so there is one for each possible state.
    static_assert(max_states == 3);
#define SGDCORE_ARRAYS                                                                                              \
    std::byte *SGDCORE_RESTRICT param, const std::byte *SGDCORE_RESTRICT grad, std::byte *SGDCORE_RESTRICT state_0, \
        std::byte *SGDCORE_RESTRICT state_1, std::byte *SGDCORE_RESTRICT state_2

    /// Updates the elements two by two, as the halves of 32-bit words: a half is a float32 after one shift or mask,
    /// where single 16-bit elements have to be widened and packed again across the lanes of a vector. On one thread of
    /// a Zen 3 machine a step over 16M elements took 7.3 ms instead of 10.7. Returns the number of elements updated,
    /// all but an odd last one.
    static SGDCORE_INLINE std::int64_t update_bfloat16_pairs(const Coefficients& coefficients, SGDCORE_ARRAYS,
                                                             std::int64_t size) {
        static_assert(std::endian::native == std::endian::little);
        // rounded_bits keeps all NaNs except those that come from a NaN among the coefficients.
        if (coefficients.has_nan()) return 0;
        using storage::BFloat16;
        using Words = Unaligned<std::uint32_t>;
        const auto low = [](std::uint32_t word) { return bits_as<float>(word << 16); };
        const auto high = [](std::uint32_t word) { return bits_as<float>(word & 0xffff0000u); };
        const auto join = [](float first, float second) {
            return (BFloat16::rounded_bits(first) >> 16) | (BFloat16::rounded_bits(second) & 0xffff0000u);
        };
        auto* const params = reinterpret_cast<Words*>(param);
        const auto* const grads = reinterpret_cast<const Words*>(grad);
        Words* const state_words[] = {reinterpret_cast<Words*>(state_0), reinterpret_cast<Words*>(state_1),
                                      reinterpret_cast<Words*>(state_2)};
        const auto loop = [&](const Coefficients known) SGDCORE_INLINE_LAMBDA {
            for (std::int64_t i = 0; i < size / 2; ++i) {
                const std::uint32_t p = params[i].value, g = grads[i].value;
                float p_low = low(p), p_high = high(p), low_states[states] = {}, high_states[states] = {};
                for_each_state<states>([&](auto state) SGDCORE_INLINE_LAMBDA {
                    if constexpr (reads(state)) {
                        const std::uint32_t word = state_words[state][i].value;
                        low_states[state] = low(word);
                        high_states[state] = high(word);
                    }
                });
                R::template update<float, variant>(known, p_low, low(g), low_states);
                R::template update<float, variant>(known, p_high, high(g), high_states);
                for_each_state<states>([&](auto state) SGDCORE_INLINE_LAMBDA {
                    if constexpr (writes(state)) {
                        state_words[state][i].value = join(low_states[state], high_states[state]);
                    }
                });
                params[i].value = join(p_low, p_high);
            }
        };
        if (coefficients.flip == 0) {
            Coefficients descent = coefficients;
            descent.flip = 0;  // known to the compiler: every instruction counts here
            loop(descent);
        } else {
            loop(coefficients);
        }
        return size / 2 * 2;
    }

    /// Updates `lanes` elements at a time, with the machine's own conversions of float16, which the compiler does not
    /// find in the plain loop. Returns the number of elements updated, all but the last few.
    static SGDCORE_INLINE std::int64_t update_lanes(const Coefficients& coefficients, SGDCORE_ARRAYS,
                                                    std::int64_t size) {
        std::byte* const state_bytes[] = {state_0, state_1, state_2};
        std::int64_t i = 0;
        for (; i + lanes <= size; i += lanes) {
            float p[lanes], g[lanes], s[states][lanes] = {};
            load_lanes<ParamStorage>(param, i, p);
            load_lanes<GradStorage>(grad, i, g);
            for_each_state<states>([&](auto state) SGDCORE_INLINE_LAMBDA {
                if constexpr (reads(state)) load_lanes<StateStorage>(state_bytes[state], i, s[state]);
            });
            for (std::int64_t lane = 0; lane < lanes; ++lane) {
                float element[states];
                for (int state = 0; state < states; ++state) element[state] = s[state][lane];
                R::template update<float, variant>(coefficients, p[lane], g[lane], element);
                for (int state = 0; state < states; ++state) s[state][lane] = element[state];
            }
            for_each_state<states>([&](auto state) SGDCORE_INLINE_LAMBDA {
                if constexpr (writes(state)) store_lanes<StateStorage>(state_bytes[state], i, s[state]);
            });
            store_lanes<ParamStorage>(param, i, p);
        }
        return i;
    }

    static SGDCORE_INLINE void update(const Coefficients& coefficients, SGDCORE_ARRAYS, std::int64_t size) {
        std::byte* const state_bytes[] = {state_0, state_1, state_2};
        constexpr auto all = [](DType dtype) {
            return ParamStorage::dtype == dtype && GradStorage::dtype == dtype && StateStorage::dtype == dtype;
        };
        std::int64_t i = 0;
        if constexpr (all(DType::bfloat16)) {
            i = update_bfloat16_pairs(coefficients, param, grad, state_0, state_1, state_2, size);
        } else if constexpr (converts_float16 && all(DType::float16)) {
            i = update_lanes(coefficients, param, grad, state_0, state_1, state_2, size);
        }
        for (; i < size; ++i) {
            C p = storage::load<ParamStorage, C>(param, i), element[states] = {};
            for_each_state<states>([&](auto state) SGDCORE_INLINE_LAMBDA {
                if constexpr (reads(state)) element[state] = storage::load<StateStorage, C>(state_bytes[state], i);
            });
            R::template update<C, variant>(coefficients, p, storage::load<GradStorage, C>(grad, i), element);
            for_each_state<states>([&](auto state) SGDCORE_INLINE_LAMBDA {
                if constexpr (writes(state)) storage::store<StateStorage>(state_bytes[state], i, element[state]);
            });
            storage::store<ParamStorage>(param, i, p);
        }
    }
#undef SGDCORE_ARRAYS

    static SGDCORE_INLINE void run(std::byte* param, const std::byte* grad, std::byte* const* state_pointers,
                                   std::int64_t size, const Values& values) {
        const auto pointer = [&](int state) {
            return state < states && writes(state) ? state_pointers[state] : nullptr;
        };
        update(Coefficients(values), param, grad, pointer(0), pointer(1), pointer(2), size);
    }
    static void narrow(std::byte* param, const std::byte* grad, std::byte* const* state_pointers, std::int64_t size,
                       const Values& values) {
        run(param, grad, state_pointers, size, values);
    }
    SGDCORE_WIDE_VECTORS static void wide(std::byte* param, const std::byte* grad, std::byte* const* state_pointers,
                                          std::int64_t size, const Values& values) {
        run(param, grad, state_pointers, size, values);
    }
};

/// True if the variant writes a state whose old content it does not read.
template <class R, typename R::Variant variant>
constexpr bool is_first_step() {
    for (int state = 0; state < state_count<R>; ++state) {
        if (R::use(variant, state) == Use::write) return true;
    }
    return false;
}

/// The rule that a variant's kernels are compiled for: R, unless R names another rule with the same update.
template <class R, typename R::Variant variant>
struct KernelRule {
    using type = R;
};
template <class R, typename R::Variant variant>
    requires requires { typename R::template Kernel<variant>; }
struct KernelRule<R, variant> {
    using type = typename R::template Kernel<variant>;
};

/// Where memory is the limit, wide vectors only cost (see CMakeLists.txt). Conversions of 16-bit storage gain by them:
/// a bfloat16 step over 64M elements on one thread of a Zen 4 machine took 13.3 ms with them, 14.7 without.
///
/// A tensor's first step happens once, so over 16-bit storage it goes by blocks. So does all 16-bit storage on the
/// x86-64 baseline, where calls of fma, which it lacks as an instruction, take most of the time.
template <class R, int index>
constexpr Kernel kernel_at() {
    constexpr Storage types = direct_storage[index / variant_count<R>];
    constexpr typename R::Variant variant = R::variants[index % variant_count<R>];
    using Kernels = Loops<typename KernelRule<R, variant>::type, variant, storage::Of<types.param>,
                          storage::Of<types.grad>, storage::Of<types.state>>;
    constexpr bool converts = item_size(types.param) == 2 || item_size(types.grad) == 2 || item_size(types.state) == 2;
    if constexpr (!converts) {
        return Kernels::narrow;
    } else if constexpr (is_x86_64_baseline || is_first_step<R, variant>()) {
        return nullptr;
    } else {
        return Kernels::wide;
    }
}

/// The kernel for blocks of float32 that stay in the L1 cache, where wide vectors gain.
template <class R, int index>
constexpr Kernel block_kernel() {
    constexpr typename R::Variant variant = R::variants[index];
    using Float32 = storage::Float32;
    using Kernels = Loops<typename KernelRule<R, variant>::type, variant, Float32, Float32, Float32>;
    return has_wide_vectors ? Kernels::wide : Kernels::narrow;
}

template <class R>
struct KernelsOf {
    static constexpr int size = direct_count * variant_count<R>;
    Kernel entries[size];
    Kernel for_blocks[variant_count<R>];
};

template <class R>
constexpr KernelsOf<R> all_kernels() {
    return
        []<int... index, int... variant>(std::integer_sequence<int, index...>, std::integer_sequence<int, variant...>) {
            return KernelsOf<R>{{kernel_at<R, index>()...}, {block_kernel<R, variant>()...}};
        }(std::make_integer_sequence<int, KernelsOf<R>::size>{}, std::make_integer_sequence<int, variant_count<R>>{});
}

template <class R>
constinit const KernelsOf<R> kernels_of = all_kernels<R>();

// Blocks

template <class Storage, class C>
SGDCORE_WIDE_VECTORS void decode(const std::byte* SGDCORE_RESTRICT from, std::int64_t size,
                                 std::byte* SGDCORE_RESTRICT to) {
    C* const elements = reinterpret_cast<C*>(to);
    std::int64_t i = 0;
    if constexpr (converts_float16 && Storage::dtype == DType::float16 && sizeof(C) == sizeof(float)) {
        for (; i + lanes <= size; i += lanes) load_lanes<Storage>(from, i, elements + i);
    }
    for (; i < size; ++i) elements[i] = storage::load<Storage, C>(from, i);
}

template <class Storage, class C>
SGDCORE_WIDE_VECTORS void encode(const std::byte* SGDCORE_RESTRICT from, std::int64_t size,
                                 std::byte* SGDCORE_RESTRICT to) {
    const C* const elements = reinterpret_cast<const C*>(from);
    std::int64_t i = 0;
    if constexpr (converts_float16 && Storage::dtype == DType::float16 && sizeof(C) == sizeof(float)) {
        for (; i + lanes <= size; i += lanes) store_lanes<Storage>(to, i, elements + i);
    }
    if constexpr (joins_halves && Storage::dtype == DType::bfloat16 && sizeof(C) == sizeof(float)) {
        for (; i + halves_lanes <= size; i += halves_lanes) {
            std::uint32_t words[halves_lanes];
            for (std::int64_t lane = 0; lane < halves_lanes; ++lane)
                words[lane] = Storage::upper_half(elements[i + lane]);
            store_upper_halves(words, to + i * 2);
        }
    }
    for (; i < size; ++i) storage::store<Storage>(to, i, elements[i]);
}

/// An element's bits without the sign, which order as the magnitudes do.
template <class Storage>
using Magnitude =
    std::conditional_t<sizeof(typename Storage::Word) == 8, std::uint64_t,
                       std::conditional_t<sizeof(typename Storage::Word) == 4, std::uint32_t, std::uint16_t>>;
template <class Storage>
constexpr int fraction_bits = Storage::dtype == DType::float64   ? 52
                              : Storage::dtype == DType::float32 ? 23
                              : Storage::dtype == DType::float16 ? 10
                                                                 : 7;

template <class Storage>
SGDCORE_INLINE Magnitude<Storage> largest_magnitude(const std::byte* elements, std::int64_t size) {
    using Bits = Magnitude<Storage>;
    constexpr Bits mask = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
    Bits largest = 0;
    for (std::int64_t i = 0; i < size; ++i) {
        const auto word = reinterpret_cast<const Unaligned<Bits>*>(elements)[i].value;
        const Bits magnitude = static_cast<Bits>(word & mask);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

template <class Storage>
SGDCORE_INLINE bool is_finite_magnitude(Magnitude<Storage> magnitude) {
    constexpr auto mask = static_cast<Magnitude<Storage>>(static_cast<Magnitude<Storage>>(~Magnitude<Storage>{0}) >> 1);
    return (magnitude >> fraction_bits<Storage>) < (mask >> fraction_bits<Storage>);
}

/// The exponent of a finite magnitude; that of the smallest normal number less one for a subnormal one.
template <class Storage>
SGDCORE_INLINE int exponent_of(Magnitude<Storage> magnitude) {
    constexpr int exponent_bits = 8 * static_cast<int>(sizeof magnitude) - 1 - fraction_bits<Storage>;
    return static_cast<int>(magnitude >> fraction_bits<Storage>) - ((1 << (exponent_bits - 1)) - 1);
}

template <class C>
using StorageOf = storage::Of<sizeof(C) == sizeof(double) ? DType::float64 : DType::float32>;

/// to[i] = function(from[i]) for elements of the compute type. The loop over equal pointers is one of its own: the
/// compiler's test for overlap would take them for overlapping.
template <class C, class Function>
SGDCORE_INLINE void map(const std::byte* from, std::int64_t size, std::byte* to, Function function) {
    using Storage = StorageOf<C>;
    if (from == to) {
        for (std::int64_t i = 0; i < size; ++i)
            storage::store<Storage>(to, i, function(storage::load<Storage, C>(to, i)));
    } else {
        for (std::int64_t i = 0; i < size; ++i) {
            storage::store<Storage>(to, i, function(storage::load<Storage, C>(from, i)));
        }
    }
}

// Precisions

template <class Storage>
using StorageWords = Unaligned<typename Storage::Word>;

SGDCORE_WIDE_VECTORS void join_split(const std::byte* SGDCORE_RESTRICT visible, const std::byte* SGDCORE_RESTRICT low,
                                     std::int64_t size, std::byte* SGDCORE_RESTRICT to) {
    using Words = StorageWords<storage::BFloat16>;
    for (std::int64_t i = 0; i < size; ++i) {
        reinterpret_cast<float*>(to)[i] = storage::Split::decode(reinterpret_cast<const Words*>(visible)[i].value,
                                                                 reinterpret_cast<const Words*>(low)[i].value);
    }
}

SGDCORE_WIDE_VECTORS void part_split(const std::byte* SGDCORE_RESTRICT from, std::int64_t size,
                                     std::byte* SGDCORE_RESTRICT visible, std::byte* SGDCORE_RESTRICT low) {
    using Words = StorageWords<storage::BFloat16>;
    for (std::int64_t i = 0; i < size; ++i) {
        const storage::Split::Words words = storage::Split::encode(reinterpret_cast<const float*>(from)[i]);
        reinterpret_cast<Words*>(visible)[i].value = words.visible;
        reinterpret_cast<Words*>(low)[i].value = words.low;
    }
}

template <class Storage>
SGDCORE_WIDE_VECTORS void join_kahan(const std::byte* SGDCORE_RESTRICT visible, const std::byte* SGDCORE_RESTRICT lost,
                                     std::int64_t size, std::byte* SGDCORE_RESTRICT to) {
    using Words = StorageWords<Storage>;
    float* const elements = reinterpret_cast<float*>(to);
    std::int64_t i = 0;
    if constexpr (converts_float16 && Storage::dtype == DType::float16) {
        for (; i + lanes <= size; i += lanes) {
            float rest[lanes];
            load_lanes<Storage>(visible, i, elements + i);
            load_lanes<Storage>(lost, i, rest);
            for (std::int64_t lane = 0; lane < lanes; ++lane) elements[i + lane] += rest[lane];
        }
    }
    for (; i < size; ++i) {
        elements[i] = storage::Kahan<Storage>::decode(reinterpret_cast<const Words*>(visible)[i].value,
                                                      reinterpret_cast<const Words*>(lost)[i].value);
    }
}

template <class Storage>
SGDCORE_WIDE_VECTORS void part_kahan(const std::byte* SGDCORE_RESTRICT from, std::int64_t size,
                                     std::byte* SGDCORE_RESTRICT visible, std::byte* SGDCORE_RESTRICT lost) {
    using Words = StorageWords<Storage>;
    const float* const elements = reinterpret_cast<const float*>(from);
    std::int64_t i = 0;
    if constexpr (converts_float16 && Storage::dtype == DType::float16) {
        for (; i + lanes <= size; i += lanes) {
            float rest[lanes];
            store_lanes<Storage>(visible, i, elements + i);
            load_lanes<Storage>(visible, i, rest);
            for (std::int64_t lane = 0; lane < lanes; ++lane) {
                rest[lane] = storage::Kahan<Storage>::lost_of(elements[i + lane], rest[lane]);
            }
            store_lanes<Storage>(lost, i, rest);
        }
    }
    for (; i < size; ++i) {
        const auto words = storage::Kahan<Storage>::encode(elements[i]);
        reinterpret_cast<Words*>(visible)[i].value = words.visible;
        reinterpret_cast<Words*>(lost)[i].value = words.lost;
    }
}

/// Rounds an element stochastically. No part of a vectorised loop, which would be much code for a few elements.
template <class Storage>
SGDCORE_NO_INLINE void encode_one(const float* from, std::int64_t i, std::byte* to, storage::RandomBits bits,
                                  std::int64_t index) {
    reinterpret_cast<StorageWords<Storage>*>(to)[i].value =
        storage::Stochastic<Storage>::encode(from[i], bits.of(static_cast<std::uint64_t>(index)));
}

/// Rounds `count` pairs of neighbours, of which the first has the number `first`.
template <class Storage>
SGDCORE_INLINE void encode_pairs(const float* SGDCORE_RESTRICT from, std::int64_t count, std::byte* SGDCORE_RESTRICT to,
                                 storage::RandomBits::Pairs numbers, std::uint32_t first) {
    using storage::Stochastic;
    auto* const words = reinterpret_cast<Unaligned<std::uint32_t>*>(to);
    std::uint32_t counter = numbers.counter(first);
    for (std::int64_t i = 0; i < count; ++i, counter += numbers.step) {
        const std::uint32_t random = numbers.number(counter);
        const std::uint32_t low = Stochastic<Storage>::encode(from[2 * i], random & 0xffffu);
        const std::uint32_t high = Stochastic<Storage>::encode(from[2 * i + 1], random >> 16);
        words[i].value = low | high << 16;
    }
}

/// Rounds elements of any stride whose pairs have numbers with one upper half. `first` is the first element's index.
template <class Storage>
SGDCORE_INLINE void encode_strided(const float* SGDCORE_RESTRICT from, std::int64_t size,
                                   std::byte* SGDCORE_RESTRICT to, storage::RandomBits::Pairs numbers,
                                   std::uint64_t first, std::int64_t stride) {
    auto* const words = reinterpret_cast<StorageWords<Storage>*>(to);
    const std::uint32_t offset = first % 2;
    const auto pair = static_cast<std::uint32_t>(first / 2), step = static_cast<std::uint32_t>(stride);
    // An index beyond 32 bits is a pair's number and half: i * stride may wrap, half of it may not.
    const std::uint32_t half_step = static_cast<std::uint32_t>(stride / 2), odd_step = step % 2;
    for (std::int64_t i = 0; i < size; ++i) {
        const auto count = static_cast<std::uint32_t>(i);
        const std::uint32_t halves = offset + count * odd_step;
        const std::uint32_t random = numbers.of(pair + count * half_step + halves / 2);
        words[i].value = storage::Stochastic<Storage>::encode(from[i], random >> (halves % 2 * 16) & 0xffffu);
    }
}

template <class Storage>
SGDCORE_WIDE_VECTORS void encode_stochastic(const std::byte* SGDCORE_RESTRICT from, std::int64_t size,
                                            std::byte* SGDCORE_RESTRICT to, storage::RandomBits bits,
                                            std::int64_t first, std::int64_t stride) {
    const float* const elements = reinterpret_cast<const float*>(from);
    std::int64_t i = 0;
    if (stride == 1) {
        if (first % 2 != 0 && size > 0) encode_one<Storage>(elements, i++, to, bits, first);
        while (size - i >= 2) {
            // As many pairs as have one upper half of their numbers.
            const std::uint64_t pair = static_cast<std::uint64_t>(first + i) / 2;
            const auto lower = static_cast<std::uint32_t>(pair);
            const std::int64_t to_next = (std::int64_t{1} << 32) - lower, left = (size - i) / 2;
            const std::int64_t count = left < to_next ? left : to_next;
            encode_pairs<Storage>(elements + i, count, to + i * 2, bits.pairs(static_cast<std::uint32_t>(pair >> 32)),
                                  lower);
            i += 2 * count;
        }
    } else if (size > 0) {
        const std::int64_t upper = first >> 33, last = first + (size - 1) * stride;
        if (last >> 33 == upper) {
            encode_strided<Storage>(elements, size, to, bits.pairs(static_cast<std::uint32_t>(upper)),
                                    static_cast<std::uint64_t>(first), stride);
            return;
        }
    }
    for (; i < size; ++i) encode_one<Storage>(elements, i, to, bits, first + i * stride);
}

template <class C>
void scale(const std::byte* from, std::int64_t size, double factor, std::byte* to) {
    const C rounded = static_cast<C>(factor);
    map<C>(from, size, to, [rounded](C value) SGDCORE_INLINE_LAMBDA { return value * rounded; });
}

template <class C>
bool clamp(const std::byte* from, std::int64_t size, double limit, std::byte* to) {
    const C rounded = static_cast<C>(limit);
    const bool finite = is_finite_magnitude<StorageOf<C>>(largest_magnitude<StorageOf<C>>(from, size));
    map<C>(from, size, to, [rounded](C value) SGDCORE_INLINE_LAMBDA { return clamped(value, rounded); });
    return finite;
}

// Sums of squares
//
// A block's largest magnitude tells a power of two, `base`, in whose binade every lane's sum stays when it begins
// there. So the difference of two sums is exact, and so is the part of a square that a sum leaves out (Fast2Sum), which
// a second sum takes. Squares of types shorter than float64 are exact in float64.

template <class Storage>
SGDCORE_WIDE_VECTORS bool add_squares(const std::byte* SGDCORE_RESTRICT elements, std::int64_t size,
                                      SquareSums& SGDCORE_RESTRICT sums) {
    constexpr bool wide = Storage::dtype == DType::float64;
    constexpr int bias = 1023;
    const auto power_of_two = [](int exponent) {
        return bits_as<double>(static_cast<std::uint64_t>(exponent + bias) << 52);
    };
    const auto largest = largest_magnitude<Storage>(elements, size);
    if (!is_finite_magnitude<Storage>(largest)) {
        double sum = 0;  // infinite or NaN
        for (std::int64_t i = 0; i < size; ++i) {
            const double value = storage::load<Storage, double>(elements, i);
            sum += value * value;
        }
        sums.high[0] += sum;
        return false;
    }
    if (largest == 0) return true;
    // All magnitudes are less than 2^(exponent + 1).
    int exponent = exponent_of<Storage>(largest);
    // Squares of float64 could overflow or vanish, so they are taken of multiples near 1.
    int shift = 0;
    if constexpr (wide) {
        shift = exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
        exponent -= shift;
    }
    const double factor = power_of_two(-shift);
    static_assert(squares_block / squares_lanes == 64);
    const double base = power_of_two(2 * (exponent + 1) + 7);
    double high[squares_lanes], low[squares_lanes];
    for (int lane = 0; lane < squares_lanes; ++lane) {
        high[lane] = base;
        low[lane] = 0;
    }
    const auto add = [&](int lane, double value) SGDCORE_INLINE_LAMBDA {
        if constexpr (wide) {
            value *= factor;
            const double square = value * value, rest = fused_multiply_add(value, value, -square);
            const double sum = high[lane] + square;
            low[lane] += (square - (sum - high[lane])) + rest;
            high[lane] = sum;
        } else if constexpr (has_fused_multiply_add) {
            const double sum = fused_multiply_add(value, value, high[lane]);
            low[lane] += fused_multiply_add(value, value, high[lane] - sum);
            high[lane] = sum;
        } else {
            const double square = value * value, sum = high[lane] + square;
            low[lane] += square - (sum - high[lane]);
            high[lane] = sum;
        }
    };
    std::int64_t i = 0;
    for (; i + squares_lanes <= size; i += squares_lanes) {
        if constexpr (converts_float16 && Storage::dtype == DType::float16) {
            float values[squares_lanes];
            for (std::int64_t at = 0; at < squares_lanes; at += lanes) {
                load_lanes<Storage>(elements, i + at, values + at);
            }
            for (int lane = 0; lane < squares_lanes; ++lane) add(lane, static_cast<double>(values[lane]));
        } else {
            for (int lane = 0; lane < squares_lanes; ++lane) {
                add(lane, storage::load<Storage, double>(elements, i + lane));
            }
        }
    }
    for (int lane = 0; i + lane < size; ++lane) add(lane, storage::load<Storage, double>(elements, i + lane));
    const double back = power_of_two(shift);
    for (int lane = 0; lane < squares_lanes; ++lane) {
        double value = high[lane] - base, rest = low[lane];
        if constexpr (wide) {
            value = value * back * back;
            rest = rest * back * back;
        }
        const double sum = sums.high[lane] + value, part = sum - sums.high[lane];
        sums.low[lane] += ((sums.high[lane] - (sum - part)) + (value - part)) + rest;
        sums.high[lane] = sum;
    }
    return true;
}

// Averages

/// The arithmetic of rules/average.hpp over arrays of these storage types.
template <class ParamStorage, class AverageStorage>
struct AveragingLoop {
    using C = storage::ComputeType<ParamStorage, ParamStorage, AverageStorage>;

    template <bool far>
    static SGDCORE_INLINE void move(std::byte* SGDCORE_RESTRICT average, const std::byte* SGDCORE_RESTRICT param,
                                    std::int64_t size, C coefficient) {
        std::int64_t i = 0;
        if constexpr (ParamStorage::dtype == DType::bfloat16 && AverageStorage::dtype == DType::bfloat16) {
            // As the halves of words: see Loops::update_bfloat16_pairs.
            using storage::BFloat16;
            using Words = Unaligned<std::uint32_t>;
            auto* const averages = reinterpret_cast<Words*>(average);
            const auto* const params = reinterpret_cast<const Words*>(param);
            for (; i < size / 2; ++i) {
                const std::uint32_t a = averages[i].value, p = params[i].value;
                const float low = moved_average<far>(bits_as<float>(a << 16), bits_as<float>(p << 16), coefficient);
                const float high =
                    moved_average<far>(bits_as<float>(a & 0xffff0000u), bits_as<float>(p & 0xffff0000u), coefficient);
                averages[i].value = (BFloat16::rounded_bits(low) >> 16) | (BFloat16::rounded_bits(high) & 0xffff0000u);
            }
            i *= 2;
        }
        for (; i < size; ++i) {
            const C a = storage::load<AverageStorage, C>(average, i), p = storage::load<ParamStorage, C>(param, i);
            storage::store<AverageStorage>(average, i, moved_average<far>(a, p, coefficient));
        }
    }

    static SGDCORE_INLINE void run(std::byte* average, const std::byte* param, std::int64_t size, double weight) {
        const AverageCoefficient<C> k(weight);
        if (k.far) {
            move<true>(average, param, size, k.value);
        } else {
            move<false>(average, param, size, k.value);
        }
    }
    static void narrow(std::byte* average, const std::byte* param, std::int64_t size, double weight) {
        run(average, param, size, weight);
    }
    SGDCORE_WIDE_VECTORS static void wide(std::byte* average, const std::byte* param, std::int64_t size,
                                          double weight) {
        run(average, param, size, weight);
    }
};

template <bool has_state, bool clear>
SGDCORE_INLINE std::uint64_t pass(std::byte* SGDCORE_RESTRICT param, std::byte* SGDCORE_RESTRICT grad,
                                  std::byte* SGDCORE_RESTRICT state, std::int64_t size) {
    using Words = Unaligned<std::uint64_t>;
    auto* const params = reinterpret_cast<Words*>(param);
    auto* const grads = reinterpret_cast<Words*>(grad);
    auto* const states = reinterpret_cast<Words*>(state);
    std::uint64_t check = 0;
    for (std::int64_t i = 0; i < size / static_cast<std::int64_t>(sizeof(Words)); ++i) {
        const std::uint64_t p = params[i].value, g = grads[i].value;
        if constexpr (has_state) {
            params[i].value = states[i].value;
            states[i].value = p;
            check ^= g;
        } else {
            params[i].value = p ^ g;
        }
        if constexpr (clear) grads[i].value = 0;
    }
    return check;
}

std::uint64_t memory_pass(std::byte* param, std::byte* grad, std::byte* state, std::int64_t size, bool clear) {
    if (state != nullptr) {
        return clear ? pass<true, true>(param, grad, state, size) : pass<true, false>(param, grad, state, size);
    }
    return clear ? pass<false, true>(param, grad, nullptr, size) : pass<false, false>(param, grad, nullptr, size);
}

template <class... R>
constexpr KernelTable make_table(RuleList<R...>) {
    using namespace storage;
    return {
        {RuleKernels{kernels_of<R>.entries, kernels_of<R>.for_blocks, variant_count<R>}...},
        {{nullptr, decode<Float64, double>},
         {decode<Float32, float>, decode<Float32, double>},
         {decode<Float16, float>, decode<Float16, double>},
         {decode<BFloat16, float>, decode<BFloat16, double>}},
        {{nullptr, encode<Float64, double>},
         {encode<Float32, float>, encode<Float32, double>},
         {encode<Float16, float>, encode<Float16, double>},
         {encode<BFloat16, float>, encode<BFloat16, double>}},
        {scale<float>, scale<double>},
        {clamp<float>, clamp<double>},
        {{},
         {nullptr, nullptr, nullptr, join_split},
         {nullptr, nullptr, join_kahan<Float16>, join_kahan<BFloat16>},
         {}},
        {{},
         {nullptr, nullptr, nullptr, part_split},
         {nullptr, nullptr, part_kahan<Float16>, part_kahan<BFloat16>},
         {}},
        {nullptr, nullptr, encode_stochastic<Float16>, encode_stochastic<BFloat16>},
        {{AveragingLoop<Float64, Float64>::narrow},
         {nullptr, AveragingLoop<Float32, Float32>::narrow},
         {},
         {nullptr, AveragingLoop<BFloat16, Float32>::wide, nullptr, AveragingLoop<BFloat16, BFloat16>::wide}},
        {add_squares<Float64>, add_squares<Float32>, add_squares<Float16>, add_squares<BFloat16>},
        memory_pass,
    };
}

}  // namespace

extern const KernelTable SGDCORE_KERNEL_TABLE;
constinit const KernelTable SGDCORE_KERNEL_TABLE = make_table(Rules{});

}  // namespace sgdcore::cpu
