// Cuts the work list into one equal part per thread and drives the kernels over each part.
//
// The list is treated as one long row of elements. Each thread takes an equal slice of the row, whichever tensors that
// covers. Cuts fall on cache lines of the parameter, so no two threads write to the same line. The rule works element
// by element, so the places of the cuts change no bit.
#include "run.hpp"

#include <algorithm>

#include "../rules/all.hpp"
#include "blocks.hpp"
#include "dispatch.hpp"
#include "strided.hpp"
#include "threads.hpp"

namespace sgdcore::cpu {
namespace {

constexpr std::int64_t cut_granularity = 64;  // elements; a whole number of cache lines for every dtype

// Below this many elements per thread, waking the thread costs more than it saves.
constexpr std::int64_t elements_per_thread = 32 * 1024;

/// The last cut at or before the `position`-th element of `tensor`: a cache line of the parameter begins there.
std::int64_t cut_at(const TensorRef& tensor, std::int64_t position) {
    if (position <= 0) return 0;
    if (position >= tensor.size) return tensor.size;
    const auto address = reinterpret_cast<std::intptr_t>(tensor.param);
    const std::int64_t to_line = (cache_line - address % cache_line) % cache_line;
    const std::int64_t lead = to_line / static_cast<std::int64_t>(item_size(tensor.param_dtype));
    if (position < lead) return 0;
    return lead + (position - lead) / cut_granularity * cut_granularity;
}

/// What each variant of a rule does with each state.
template <class R>
struct UsesOf {
    constexpr UsesOf() {
        for (int variant = 0; variant < variant_count<R>; ++variant) {
            for (int state = 0; state < state_count<R>; ++state)
                of[variant][state] = R::use(R::variants[variant], state);
        }
    }
    Use of[variant_count<R>][max_states] = {};
};
template <class R>
constexpr UsesOf<R> uses_of;

/// What each state of a rule starts with.
template <class R>
struct StartsOf {
    constexpr StartsOf() {
        for (int state = 0; state < state_count<R>; ++state) of[state] = R::states[state].start;
    }
    Start of[max_states] = {};
};
template <class R>
constexpr StartsOf<R> starts_of;

/// The kernel for a tensor as it is stored, or for blocks of its compute type.
template <class R>
SGDCORE_INLINE Choice choose(const RuleKernels& kernels, const TensorRef& tensor, const Hyper& hyper,
                             bool changes_grads) {
    // A parameter in a precision of its own is read into a block of the compute type.
    const DType param = hyper.precision == Precision::plain ? tensor.param_dtype : DType::float32;
    bool wide = param == DType::float64 || tensor.grad_dtype == DType::float64;
    // The type of the states that take part. Without such states the type has no effect.
    DType state_dtype = param;
    bool found = false, alike = true;
    for (int state = 0; state < state_count<R>; ++state) {
        if (!hyper.has_state(state)) continue;
        const DType dtype = tensor.state_dtypes[state];
        alike = alike && (!found || dtype == state_dtype);
        wide = wide || dtype == DType::float64;
        state_dtype = dtype;
        found = true;
    }
    // The kernel gets a gradient that is changed in the compute type.
    const DType compute = wide ? DType::float64 : DType::float32;
    const DType grad = changes_grads ? compute : tensor.grad_dtype;
    constexpr bool fills = (starting<R, Start::zeros> | starting<R, Start::parameter>) != 0;
    const Start* const starts = fills && tensor.first_step ? starts_of<R>.of : nullptr;
    const int direct = alike && starts == nullptr ? direct_index.find({param, grad, state_dtype}) : -1;
    const int variant = hyper.variant(tensor.first_step);
    const Use* const uses = uses_of<R>.of[variant];
    const Kernel kernel = direct < 0 ? nullptr : kernels.find(direct, variant);
    if (kernel != nullptr) return {kernel, true, wide, uses, nullptr};
    return {kernels.for_blocks(tensor.param_dtype, wide, variant), false, wide, uses, starts};
}

struct Work {
    const KernelTable& kernels;
    std::span<const TensorRef> tensors;
    std::span<const Hyper> hypers;
    const StepOptions& options;
    bool changes_grads;  // the options'
    std::int64_t total;
    Staging* staging;  // one for each thread; may be null where there is one tensor and one thread
};

/// Updates the elements [begin, end) of one tensor.
template <class R>
SGDCORE_INLINE void update_range(const Work& work, const TensorRef& tensor, int thread, std::int64_t begin,
                                 std::int64_t end) {
    const Hyper& hyper = work.hypers[tensor.hyper];
    const StepOptions& options = work.options;
    const Choice choice = choose<R>(work.kernels.rules[options.rule], tensor, hyper, work.changes_grads);
    if (!choice.direct || !tensor.grad_axes.empty() || work.changes_grads || options.zero_grad ||
        tensor.has_average() || hyper.precision != Precision::plain) {
        Staging& staging = work.staging == nullptr ? *staging_for(1) : work.staging[thread];
        return update_blocks(work.kernels, choice, tensor, hyper, options, staging, begin, end);
    }
    const auto offset = [&](DType dtype) { return begin * static_cast<std::int64_t>(item_size(dtype)); };
    std::byte* states[state_count<R>];
    for (int state = 0; state < state_count<R>; ++state) {
        states[state] = hyper.has_state(state) ? tensor.states[state] + offset(tensor.state_dtypes[state]) : nullptr;
    }
    choice.kernel(tensor.param + offset(tensor.param_dtype), tensor.grad + offset(tensor.grad_dtype), states,
                  end - begin, hyper.values);
}

/// The slice of the work that belongs to `thread` of `count`.
template <class R>
void run_slice(void* context, int thread, int count) {
    const Work& work = *static_cast<const Work*>(context);
    // total * thread could overflow. The second term spreads the remainder over the first threads.
    const std::int64_t share = work.total / count, rest = work.total % count;
    const std::int64_t begin = share * thread + std::min<std::int64_t>(thread, rest);
    const std::int64_t end = begin + share + (thread < rest ? 1 : 0);
    std::int64_t start = 0;  // of the current tensor, in the row of all elements
    for (const TensorRef& tensor : work.tensors) {
        if (start >= end) break;
        const std::int64_t from = cut_at(tensor, begin - start), to = cut_at(tensor, end - start);
        if (from < to) update_range<R>(work, tensor, thread, from, to);
        start += tensor.size;
    }
}

}  // namespace

void run(std::span<const TensorRef> tensors, std::span<const Hyper> hypers, const StepOptions& options) {
    std::int64_t total = 0;
    for (const TensorRef& tensor : tensors) total += tensor.size;
    // num_threads() asks OpenMP, which the smallest steps would notice.
    const std::int64_t worth = total / elements_per_thread;
    const int threads = worth < 2 ? 1 : static_cast<int>(std::min<std::int64_t>(worth, num_threads()));
    // Memory is allocated before anything is changed.
    Staging* const staging = tensors.size() > 1 || threads > 1 ? staging_for(threads) : nullptr;
    Work work{*instruction_set().table, tensors, hypers, options, options.changes_grads(), total, staging};
    with_rule(options.rule, [&]<class R>(RuleTag<R>) SGDCORE_INLINE_LAMBDA {
        if (threads == 1) {
            // The smallest steps would notice the divisions of the cuts.
            for (const TensorRef& tensor : tensors) {
                if (tensor.size > 0) update_range<R>(work, tensor, 0, 0, tensor.size);
            }
        } else {
            run_parallel(threads, run_slice<R>, &work);
        }
    });
    if (!options.zero_grad) return;
    for (const TensorRef& tensor : tensors) {
        if (tensor.size > 0 && !tensor.grad_axes.empty() && grad_may_overlap(tensor)) {
            StridedGradient(tensor, 0).clear(tensor.size);
        }
    }
}

}  // namespace sgdcore::cpu
