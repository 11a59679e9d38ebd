// The kernel's body: the walk over chunks, and the loop around the rule. Compiled by nvcc for the device, and by the
// C++ compiler for the simulated one that the tests use.
//
// Invariants. A chunk belongs to one block, and an element of it to one thread, which alone reads and writes it; so
// blocks and threads may come in any order, and the rule, compiled without contraction, gives the CPU's bits.
// Arithmetic in float64 that does not belong to an element is left to one thread of a block: on many devices it has
// 1/64 of float32's rate.
#pragma once

#include <cstdint>
#include <type_traits>

#include "table.hpp"

namespace sgdcore::cuda {

/// One chunk's work under the rule R, put together by one thread of a block for all.
template <class R>
struct Work {
    std::byte *param, *grad, *states[state_count<R>];  // at the chunk's first element; grad at the tensor's, if strided
    const Axis* axes;
    std::int64_t start;  // the chunk's first element in its tensor
    std::int32_t count, head, axis_count, variant;
    Path path;
    Use uses[state_count<R>];
    bool grad_in_vectors, zero_grad, scaled, in_float64;
    DType param_dtype, grad_dtype, state_dtypes[state_count<R>];
    double factor;
    typename R::template Coefficients<float> in_float;
    typename R::template Coefficients<double> in_double;
};

#if defined(__CUDA_ARCH__)
#define SGDCORE_UNROLL _Pragma("unroll")
#else
#define SGDCORE_UNROLL
#endif

// Memory

/// Tells the compiler that a pointer is one into device memory, which it cannot see in a table.
SGDCORE_HOST_DEVICE SGDCORE_INLINE std::byte* in_device_memory(std::byte* pointer) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
}

template <class Storage>
inline constexpr int item_of = sizeof(typename Storage::Word);

template <class Storage>
SGDCORE_HOST_DEVICE SGDCORE_INLINE typename Storage::Word load_word(const std::byte* base, std::int64_t index) {
    using Word [[gnu::may_alias]] = typename Storage::Word;
    return reinterpret_cast<const Word*>(base)[index];
}

template <class Storage>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void store_word(std::byte* base, std::int64_t index, typename Storage::Word word) {
    using Word [[gnu::may_alias]] = typename Storage::Word;
    reinterpret_cast<Word*>(base)[index] = word;
}

template <class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE C load_as(DType dtype, const std::byte* base, std::int64_t index) {
    switch (dtype) {
        case DType::float64:
            return static_cast<C>(load_word<storage::Float64>(base, index));
        case DType::float32:
            return static_cast<C>(load_word<storage::Float32>(base, index));
        case DType::float16:
            return static_cast<C>(storage::Float16::decode(load_word<storage::Float16>(base, index)));
        default:
            return static_cast<C>(storage::BFloat16::decode(load_word<storage::BFloat16>(base, index)));
    }
}

template <class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void store_as(DType dtype, std::byte* base, std::int64_t index, C value) {
    switch (dtype) {
        case DType::float64:
            return store_word<storage::Float64>(base, index, static_cast<double>(value));
        case DType::float32:
            return store_word<storage::Float32>(base, index, static_cast<float>(value));
        case DType::float16:
            return store_word<storage::Float16>(base, index, storage::Float16::encode(value));
        default:
            return store_word<storage::BFloat16>(base, index, storage::BFloat16::encode(value));
    }
}

/// What a thread reads or writes at once.
struct alignas(vector_bytes) [[gnu::may_alias]] Quad {
    std::uint32_t x, y, z, w;
};

/// `lanes` elements next to each other, as they are stored.
template <class Storage, int lanes>
struct Vector {
    using StorageWord = typename Storage::Word;
    static constexpr int item = sizeof(StorageWord);
    static constexpr int quads = lanes * item / vector_bytes;
    static_assert(quads * vector_bytes == lanes * item);
    std::uint32_t words[4 * quads];

    SGDCORE_HOST_DEVICE SGDCORE_INLINE void load(const std::byte* from) {
        for (int i = 0; i < quads; ++i) {
            const Quad quad = reinterpret_cast<const Quad*>(from)[i];
            words[4 * i] = quad.x;
            words[4 * i + 1] = quad.y;
            words[4 * i + 2] = quad.z;
            words[4 * i + 3] = quad.w;
        }
    }
    /// From where no vector lies, element by element.
    SGDCORE_HOST_DEVICE SGDCORE_INLINE void load_elements(const std::byte* from) {
        *this = {};
        for (int lane = 0; lane < lanes; ++lane) set_word(lane, load_word<Storage>(from, lane));
    }
    SGDCORE_HOST_DEVICE SGDCORE_INLINE void store(std::byte* to) const {
        for (int i = 0; i < quads; ++i) {
            reinterpret_cast<Quad*>(to)[i] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
        }
    }
    SGDCORE_HOST_DEVICE SGDCORE_INLINE StorageWord word(int lane) const {
        if constexpr (item == 8) {
            return bits_as<double>(std::uint64_t{words[2 * lane + 1]} << 32 | std::uint64_t{words[2 * lane]});
        } else if constexpr (item == 4) {
            return bits_as<float>(words[lane]);
        } else {
            return static_cast<StorageWord>(words[lane / 2] >> (lane % 2 * 16));
        }
    }
    SGDCORE_HOST_DEVICE SGDCORE_INLINE void set_word(int lane, StorageWord word) {
        if constexpr (item == 8) {
            const auto bits = bits_as<std::uint64_t>(word);
            words[2 * lane] = static_cast<std::uint32_t>(bits);
            words[2 * lane + 1] = static_cast<std::uint32_t>(bits >> 32);
        } else if constexpr (item == 4) {
            words[lane] = bits_as<std::uint32_t>(word);
        } else {
            const std::uint32_t bits = word, other = words[lane / 2];
            words[lane / 2] = lane % 2 == 0 ? (other & 0xffff0000u) | bits : (other & 0xffffu) | bits << 16;
        }
    }
};

// The rule

/// Calls `function` with the index of a variant as a constant. All threads of a block take the same way.
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

/// Where the gradient of an element is.
template <class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE std::byte* grad_of(const Work<R>& work, int index) {
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
        if (work.uses[state] != Use::update) continue;
        s[state] = load_as<C>(work.state_dtypes[state], in_device_memory(work.states[state]), index);
    }
    if (work.scaled) g = static_cast<C>(work.factor) * g;
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

/// Updates what one thread has of a chunk, in vectors, from `work.head` on. Returns how many elements all threads
/// together update. All loads of a turn are under way before the first is needed.
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
        // A state that takes no part is null, to which nothing may be added.
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
            at[i] = (vector < vectors ? vector : first) * lanes;  // a second time instead of none
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
            }
        }
        if (work.scaled) {
            SGDCORE_UNROLL
            for (int i = 0; i < turn * lanes; ++i) g[i] = static_cast<C>(work.factor) * g[i];
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

// The walk over chunks

/// Puts the `number`-th of the numbers that a device may read among `values`, if it is on the device.
template <class R, int number>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void read_on_device(const DeviceHyper& group, Values& values) {
    if constexpr (device_hyper<R, number> >= 0) {
        const DeviceNumber& source = group.on_device[number];
        if (source.address != nullptr)
            values[device_hyper<R, number>] = load_as<double>(source.dtype, source.address, 0);
    }
}

/// Finds out what there is to do for a chunk.
template <class R>
SGDCORE_HOST_DEVICE inline void prepare(const Launch& launch, std::int64_t number, Work<R>& work) {
    const Chunk chunk = launch.chunks[number];
    const DeviceTensor tensor = launch.tensors[chunk.tensor];
    Values values = launch.hypers[tensor.hyper].values;
    static_assert(max_device_hypers == 2);
    read_on_device<R, 0>(launch.hypers[tensor.hyper], values);
    read_on_device<R, 1>(launch.hypers[tensor.hyper], values);
    bool first = tensor.first;
    if (tensor.pending != nullptr) {
        // This block alone has the chunk, and goes on to fill its states.
        first = first || tensor.pending[chunk.index] != 0;
        tensor.pending[chunk.index] = 0;
    }
    const std::int64_t start = chunk.index * chunk_size;
    const std::int64_t rest = tensor.size - start;
    work.count = static_cast<std::int32_t>(rest < chunk_size ? rest : chunk_size);
    work.head = tensor.head < work.count ? tensor.head : work.count;
    work.start = start;
    work.axes = launch.axes + tensor.axes;
    work.axis_count = tensor.axis_count;
    work.param = tensor.param + start * static_cast<std::int64_t>(item_size(tensor.param_dtype));
    work.grad = tensor.grad;
    if (tensor.axis_count == 0) work.grad += start * static_cast<std::int64_t>(item_size(tensor.grad_dtype));
    work.param_dtype = tensor.param_dtype;
    work.grad_dtype = tensor.grad_dtype;
    work.in_float64 = tensor.param_dtype == DType::float64 || tensor.grad_dtype == DType::float64;
    for (int state = 0; state < state_count<R>; ++state) {
        const DType dtype = tensor.state_dtypes[state];
        std::byte* const memory = tensor.states[state];
        work.states[state] = memory == nullptr ? nullptr : memory + start * static_cast<std::int64_t>(item_size(dtype));
        work.state_dtypes[state] = dtype;
        work.in_float64 = work.in_float64 || (memory != nullptr && dtype == DType::float64);
    }
    work.variant = R::variant(values, first);
    with_variant<R>(work.variant, [&](auto index) {
        for (int state = 0; state < state_count<R>; ++state) {
            work.uses[state] = R::use(R::variants[decltype(index)::value], state);
        }
    });
    work.path = tensor.path;
    work.grad_in_vectors = tensor.grad_in_vectors;
    work.zero_grad = launch.zero_grad;
    // As torch's GradScaler undoes its scale: the reciprocal in float64, rounded to float32.
    work.factor = launch.grad_scale == nullptr
                      ? launch.grad_factor
                      : static_cast<double>(static_cast<float>(1 / static_cast<double>(*launch.grad_scale)));
    work.scaled = work.factor != 1;
    work.in_float = typename R::template Coefficients<float>(values);
    work.in_double = typename R::template Coefficients<double>(values);
}

template <class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE int update_in_vectors(const Work<R>& work, int thread) {
    using namespace storage;
    switch (work.path) {
        case Path::float64:
            return update_vectors<Float64, Float64, Float64>(work, thread);
        case Path::float32:
            return update_vectors<Float32, Float32, Float32>(work, thread);
        case Path::float16:
            return update_vectors<Float16, Float16, Float16>(work, thread);
        case Path::bfloat16:
            return update_vectors<BFloat16, BFloat16, BFloat16>(work, thread);
        case Path::float16_float16_float32:
            return update_vectors<Float16, Float16, Float32>(work, thread);
        case Path::bfloat16_bfloat16_float32:
            return update_vectors<BFloat16, BFloat16, Float32>(work, thread);
        case Path::float32_float16_float32:
            return update_vectors<Float32, Float16, Float32>(work, thread);
        case Path::float32_bfloat16_float32:
            return update_vectors<Float32, BFloat16, Float32>(work, thread);
        case Path::elements:
            break;
    }
    return 0;
}

/// Updates what one thread has of a chunk.
template <class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void update(const Work<R>& work, int thread) {
    const int in_vectors = update_in_vectors(work, thread);
    // The rest, before and behind the vectors: a few elements, or all.
    for (int i = thread; i < work.count - in_vectors; i += block_threads) {
        update_element(work, i < work.head ? i : i + in_vectors);
    }
}

/// What one block does: every `block.count()`-th chunk, from `block.index()` on.
///
/// `leader(f)` calls f() in one thread of the block, `each_thread(f)` calls f(thread) in all, and `barrier()` waits for
/// all. The leader prepares the next chunk while the others update.
template <class R, class Block>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void run_block(const Launch& launch, Block& block, Work<R> (&works)[2]) {
    if (launch.found_inf != nullptr && *launch.found_inf != 0) return;
    int current = 0;
    block.leader([&] {
        if (block.index() < launch.chunk_count) prepare(launch, block.index(), works[0]);
    });
    block.barrier();
    for (std::int64_t chunk = block.index(); chunk < launch.chunk_count; chunk += block.count()) {
        block.leader([&] {
            const std::int64_t next = chunk + block.count();
            if (next < launch.chunk_count) prepare(launch, next, works[current ^ 1]);
        });
        block.each_thread([&](int thread) SGDCORE_INLINE_LAMBDA { update(works[current], thread); });
        block.barrier();
        current ^= 1;
    }
}

// The yardstick of the benchmarks

/// What one thread does of a step's memory traffic without its arithmetic: parameter and state change places, with
/// the gradient's bits flipped in one of them, so that it has to be read.
SGDCORE_HOST_DEVICE SGDCORE_INLINE void memory_pass(const MemoryPassArrays& arrays, std::int64_t thread,
                                                    std::int64_t threads) {
    constexpr int turn = 2;
    for (std::int64_t first = thread; first < arrays.quads; first += turn * threads) {
        Vector<storage::Float32, 4> p[turn], g[turn], b[turn];
        std::int64_t at[turn];
        SGDCORE_UNROLL
        for (int i = 0; i < turn; ++i) {
            const std::int64_t quad = first + i * threads;
            at[i] = (quad < arrays.quads ? quad : first) * vector_bytes;
            p[i].load(arrays.param + at[i]);
            g[i].load(arrays.grad + at[i]);
            b[i].load(arrays.state + at[i]);
        }
        SGDCORE_UNROLL
        for (int i = 0; i < turn; ++i) {
            if (first + i * threads >= arrays.quads) break;
            for (int word = 0; word < 4; ++word) b[i].words[word] ^= g[i].words[word];
            b[i].store(arrays.param + at[i]);
            p[i].store(arrays.state + at[i]);
        }
    }
}

}  // namespace sgdcore::cuda
