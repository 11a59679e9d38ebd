// The loops around the rule: how a block's threads update one chunk.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../rules/average.hpp"
#include "memory.hpp"

namespace sgdcore::cuda {

/// The average of one chunk's elements.
struct AverageWork {
    std::byte* memory;  // null without an average
    bool is_new, in_vectors, in_float64;
    DType dtype;
    AverageCoefficient<float> in_float;
    AverageCoefficient<double> in_double;
};

template <class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE const AverageCoefficient<C>& coefficient_of(const AverageWork& work) {
    if constexpr (sizeof(C) == sizeof(double)) {
        return work.in_double;
    } else {
        return work.in_float;
    }
}

/// One chunk's work under the rule R. One thread of a block puts it together for all.
template <class R>
struct Work {
    std::byte *param, *grad, *states[state_count<R>];  // at the chunk's first element; grad at the tensor's, if strided
    const Axis* axes;
    std::int64_t start;  // the chunk's first element in its tensor
    std::int32_t count, head, axis_count, variant;
    Path path;
    Use uses[state_count<R>];  // of this chunk: `write` also for a variant that would read a state, which is zero then
    bool from_param[state_count<R>];  // a state that is not read counts as the parameter instead of zero
    bool grad_in_vectors, zero_grad, scaled, clipped, limited, left_out, in_float64;
    DType param_dtype, grad_dtype, state_dtypes[state_count<R>];
    double factor, clip_value, clip_factor;
    typename R::template Coefficients<float> in_float;
    typename R::template Coefficients<double> in_double;
    AverageWork average;
};

/// The factor that undoes the gradients' scale. torch's GradScaler undoes its scale by the reciprocal in float64,
/// rounded to float32.
SGDCORE_HOST_DEVICE SGDCORE_INLINE double factor_of(const Launch& launch) {
    if (launch.grad_scale == nullptr) return launch.grad_factor;
    return static_cast<double>(static_cast<float>(1 / static_cast<double>(*launch.grad_scale)));
}

/// Calls `function` with the index of a variant as a constant. All threads of a block have the same variant.
template <class R, class Function>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void with_variant(int variant, Function function) {
#define SGDCORE_VARIANT(index)                                                                  \
    case index:                                                                                 \
        if constexpr (index < variant_count<R>) function(std::integral_constant<int, index>{}); \
        break;
    static_assert(max_variants == 16);  // a variant missing below would update nothing
    switch (variant) {
        SGDCORE_VARIANT(0)
        SGDCORE_VARIANT(1)
        SGDCORE_VARIANT(2)
        SGDCORE_VARIANT(3)
        SGDCORE_VARIANT(4)
        SGDCORE_VARIANT(5)
        SGDCORE_VARIANT(6)
        SGDCORE_VARIANT(7)
        SGDCORE_VARIANT(8)
        SGDCORE_VARIANT(9)
        SGDCORE_VARIANT(10)
        SGDCORE_VARIANT(11)
        SGDCORE_VARIANT(12)
        SGDCORE_VARIANT(13)
        SGDCORE_VARIANT(14)
        SGDCORE_VARIANT(15)
        default:
            break;
    }
#undef SGDCORE_VARIANT
}

template <class C, class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE const typename R::template Coefficients<C>& coefficients_of(const Work<R>& work) {
    if constexpr (sizeof(C) == sizeof(double)) {
        return work.in_double;
    } else {
        return work.in_float;
    }
}

/// The address of an element's gradient.
template <class AnyWork>
SGDCORE_HOST_DEVICE SGDCORE_INLINE std::byte* grad_of(const AnyWork& work, int index) {
    std::byte* address = in_device_memory(work.grad);
    if (work.axis_count == 0) return address + index * static_cast<int>(item_size(work.grad_dtype));
    std::int64_t rest = work.start + index;
    for (int axis = work.axis_count; axis-- > 0;) {
        const Axis& a = work.axes[axis];
        address += rest % a.length * a.stride;
        rest /= a.length;
    }
    return address;
}

template <class C, class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void update_element_in(const Work<R>& work, int index) {
    constexpr int states = state_count<R>;
    std::byte* const param = in_device_memory(work.param);
    std::byte* const grad = grad_of(work, index);
    C p = load_as<C>(work.param_dtype, param, index);
    C g = load_as<C>(work.grad_dtype, grad, 0);
    C s[states] = {};
    SGDCORE_UNROLL
    for (int state = 0; state < states; ++state) {
        if (starting<R, Start::parameter> != 0 && work.from_param[state]) s[state] = p;
        if (work.uses[state] != Use::update) continue;
        s[state] = load_as<C>(work.state_dtypes[state], in_device_memory(work.states[state]), index);
    }
    if (work.scaled) g = static_cast<C>(work.factor) * g;
    if (work.clipped) g = clamped(g, static_cast<C>(work.clip_value));
    if (work.limited) g = static_cast<C>(work.clip_factor) * g;
    with_variant<R>(work.variant, [&](auto variant) SGDCORE_INLINE_LAMBDA {
        R::template update<C, R::variants[decltype(variant)::value]>(coefficients_of<C>(work), p, g, s);
    });
    SGDCORE_UNROLL
    for (int state = 0; state < states; ++state) {
        if (work.uses[state] == Use::none) continue;
        store_as(work.state_dtypes[state], in_device_memory(work.states[state]), index, s[state]);
    }
    store_as(work.param_dtype, param, index, p);
    if (work.zero_grad) store_as(work.grad_dtype, grad, 0, C{0});
}

/// Updates an element of any storage types.
template <class R>
SGDCORE_HOST_DEVICE inline void update_element(const Work<R>& work, int index) {
    if (work.in_float64) {
        update_element_in<double>(work, index);
    } else {
        update_element_in<float>(work, index);
    }
}

template <class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE C next_average(const AverageCoefficient<C>& k, C a, C p) {
    return k.far ? moved_average<true>(a, p, k.value) : moved_average<false>(a, p, k.value);
}

template <class C, class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void average_element_in(const Work<R>& work, int index) {
    const C p = load_as<C>(work.param_dtype, in_device_memory(work.param), index);
    std::byte* const memory = in_device_memory(work.average.memory);
    C a = p;
    if (!work.average.is_new) {
        a = next_average(coefficient_of<C>(work.average), load_as<C>(work.average.dtype, memory, index), p);
    }
    store_as(work.average.dtype, memory, index, a);
}

/// Moves the average of an element of any storage types.
template <class R>
SGDCORE_HOST_DEVICE inline void average_element(const Work<R>& work, int index) {
    if (work.average.in_float64) {
        average_element_in<double>(work, index);
    } else {
        average_element_in<float>(work, index);
    }
}

/// Moves the average of `count` elements from `first` on, a whole number of vectors of parameter and average.
template <class Storage, class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void average_vectors(const Work<R>& work, int first, int count) {
    using C = storage::ComputeType<Storage, Storage, Storage>;
    constexpr int lanes = vector_bytes / item_of<Storage>;
    for (int at = first; at < first + count; at += lanes) {
        Vector<Storage, lanes> p, a;
        p.load(in_device_memory(work.param) + at * item_of<Storage>);
        std::byte* const memory = in_device_memory(work.average.memory) + at * item_of<Storage>;
        if (work.average.is_new) {
            a = p;
        } else {
            a.load(memory);
            SGDCORE_UNROLL
            for (int lane = 0; lane < lanes; ++lane) {
                const C moved =
                    next_average(coefficient_of<C>(work.average), static_cast<C>(Storage::decode(a.word(lane))),
                                 static_cast<C>(Storage::decode(p.word(lane))));
                a.set_word(lane, Storage::encode(moved));
            }
        }
        a.store(memory);
    }
}

/// Updates one thread's vectors of a chunk, from `work.head` on. Returns the number of elements that all threads update
/// together. All loads of a turn are in flight before the first result is needed.
template <class Param, class Grad, class State, class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE int update_vectors(const Work<R>& work, int thread) {
    using C = storage::ComputeType<Param, Grad, State>;
    constexpr int states = state_count<R>;
    constexpr int smallest = item_of<Param> < item_of<Grad> ? item_of<Param> : item_of<Grad>;
    constexpr int lanes = vector_bytes / smallest;
    constexpr int turn = lanes == 8 ? 1 : 2;  // vectors; eight elements of float32 arithmetic, four of float64
    const int vectors = (work.count - work.head) / lanes;
    std::byte* const param = in_device_memory(work.param + work.head * item_of<Param>);
    std::byte* const grad = in_device_memory(work.grad + work.head * item_of<Grad>);
    std::byte* state_memory[states];
    SGDCORE_UNROLL
    for (int state = 0; state < states; ++state) {
        // Nothing may be added to the null pointer of a state that takes no part.
        const int head = work.uses[state] == Use::none ? 0 : work.head * item_of<State>;
        state_memory[state] = in_device_memory(work.states[state] + head);
    }

    for (int first = thread; first < vectors; first += turn * block_threads) {
        int at[turn];
        Vector<Param, lanes> p_stored[turn];
        Vector<Grad, lanes> g_stored[turn];
        Vector<State, lanes> s_stored[states][turn];
        SGDCORE_UNROLL
        for (int i = 0; i < turn; ++i) {
            const int vector = first + i * block_threads;
            at[i] =
                (vector < vectors ? vector : first) * lanes;  // loads its first vector a second time instead of none
            p_stored[i].load(param + at[i] * item_of<Param>);
            if (work.grad_in_vectors) {
                g_stored[i].load(grad + at[i] * item_of<Grad>);
            } else {
                g_stored[i].load_elements(grad + at[i] * item_of<Grad>);
            }
        }
        SGDCORE_UNROLL
        for (int state = 0; state < states; ++state) {
            if (work.uses[state] == Use::update) {
                SGDCORE_UNROLL
                for (int i = 0; i < turn; ++i) s_stored[state][i].load(state_memory[state] + at[i] * item_of<State>);
            } else {
                SGDCORE_UNROLL
                for (int i = 0; i < turn; ++i) s_stored[state][i] = {};
            }
        }

        C p[turn * lanes], g[turn * lanes], s[turn * lanes][states];
        SGDCORE_UNROLL
        for (int i = 0; i < turn * lanes; ++i) {
            p[i] = static_cast<C>(Param::decode(p_stored[i / lanes].word(i % lanes)));
            g[i] = static_cast<C>(Grad::decode(g_stored[i / lanes].word(i % lanes)));
            SGDCORE_UNROLL
            for (int state = 0; state < states; ++state) {
                s[i][state] = static_cast<C>(State::decode(s_stored[state][i / lanes].word(i % lanes)));
                if (starting<R, Start::parameter> != 0 && work.from_param[state]) s[i][state] = p[i];
            }
        }
        if (work.scaled) {
            SGDCORE_UNROLL
            for (int i = 0; i < turn * lanes; ++i) g[i] = static_cast<C>(work.factor) * g[i];
        }
        if (work.clipped) {
            SGDCORE_UNROLL
            for (int i = 0; i < turn * lanes; ++i) g[i] = clamped(g[i], static_cast<C>(work.clip_value));
        }
        if (work.limited) {
            SGDCORE_UNROLL
            for (int i = 0; i < turn * lanes; ++i) g[i] = static_cast<C>(work.clip_factor) * g[i];
        }
        with_variant<R>(work.variant, [&](auto variant) SGDCORE_INLINE_LAMBDA {
            const typename R::template Coefficients<C> coefficients = coefficients_of<C>(work);
            SGDCORE_UNROLL
            for (int i = 0; i < turn * lanes; ++i) {
                R::template update<C, R::variants[decltype(variant)::value]>(coefficients, p[i], g[i], s[i]);
            }
        });

        SGDCORE_UNROLL
        for (int i = 0; i < turn; ++i) {
            if (first + i * block_threads >= vectors) break;
            SGDCORE_UNROLL
            for (int lane = 0; lane < lanes; ++lane) {
                p_stored[i].set_word(lane, Param::encode(p[i * lanes + lane]));
            }
            p_stored[i].store(param + at[i] * item_of<Param>);
            SGDCORE_UNROLL
            for (int state = 0; state < states; ++state) {
                if (work.uses[state] == Use::none) continue;
                SGDCORE_UNROLL
                for (int lane = 0; lane < lanes; ++lane) {
                    s_stored[state][i].set_word(lane, State::encode(s[i * lanes + lane][state]));
                }
                s_stored[state][i].store(state_memory[state] + at[i] * item_of<State>);
            }
            if (work.zero_grad) {
                std::byte* const to = grad + at[i] * item_of<Grad>;
                g_stored[i] = {};
                if (work.grad_in_vectors) {
                    g_stored[i].store(to);
                } else {
                    for (int lane = 0; lane < lanes; ++lane) store_word<Grad>(to, lane, 0);
                }
            }
        }
    }
    return vectors * lanes;
}

}  // namespace sgdcore::cuda
