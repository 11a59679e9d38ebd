// Cuts the work list into one equal part per thread and drives the kernels over each part.
//
// The list is treated as one long row of elements; each thread takes an equal slice of it, whichever tensors that
// covers. Cuts fall on cache lines of the parameter, so no two threads write to the same line, and since
// the rule works element by element, where they fall does not change a bit.
#include "run.hpp"

#include <algorithm>

#include "blocks.hpp"
#include "dispatch.hpp"
#include "strided.hpp"
#include "threads.hpp"

namespace sgdcore::cpu {
namespace {

constexpr std::int64_t cut_granularity = 64;  // elements; a whole number of cache lines for every dtype

// Below this many elements per thread, waking the thread costs more than it saves.
constexpr std::int64_t elements_per_thread = 32 * 1024;

/// The part of `tensor` before its `position`-th element that ends on a cache line of the parameter.
std::int64_t cut_at(const TensorRef& tensor, std::int64_t position) {
    if (position <= 0) return 0;
    if (position >= tensor.size) return tensor.size;
    const auto address = reinterpret_cast<std::intptr_t>(tensor.param);
    const std::int64_t to_line = (cache_line - address % cache_line) % cache_line;
    const std::int64_t lead = to_line / static_cast<std::int64_t>(item_size(tensor.param_dtype));
    if (position < lead) return 0;
    return lead + (position - lead) / cut_granularity * cut_granularity;
}

constexpr int rule = 0;  // SGD's number

/// The kernel for a tensor as it is stored, or for blocks of its compute type.
SGDCORE_INLINE Choice choose(const KernelTable& table, const TensorRef& tensor, const SgdHyper& hyper,
                             const StepOptions& options) {
    // Without momentum its type plays no part.
    const DType state = hyper.momentum == 0 ? tensor.param_dtype : tensor.momentum_dtype;
    const bool wide = computes_in_float64(tensor.param_dtype, tensor.grad_dtype, state, true);
    // A gradient that is scaled comes to the kernel in the compute type.
    const DType compute = wide ? DType::float64 : DType::float32;
    const DType grad = options.grad_factor == 1 ? tensor.grad_dtype : compute;
    const int direct = direct_index.find({tensor.param_dtype, grad, state});
    const int blocks = direct_index.find({compute, compute, compute});
    return {table.rules[rule].find(direct >= 0 ? direct : blocks, Sgd::variant(hyper, tensor.first)), direct >= 0};
}

/// Updates the elements [begin, end) of one tensor. `staging` is null where the calling thread runs alone.
SGDCORE_INLINE void update_range(const KernelTable& table, const TensorRef& tensor, const SgdHyper& hyper,
                                 const StepOptions& options, Staging* staging, std::int64_t begin, std::int64_t end) {
    const Choice choice = choose(table, tensor, hyper, options);
    if (!choice.direct || !tensor.grad_axes.empty() || options.grad_factor != 1 || options.zero_grad) {
        if (staging == nullptr) staging = staging_for(1);
        return update_blocks(table, choice, tensor, hyper, options, *staging, begin, end);
    }
    const auto offset = [&](DType dtype) { return begin * static_cast<std::int64_t>(item_size(dtype)); };
    std::byte* const states[] = {hyper.momentum == 0 ? nullptr : tensor.momentum + offset(tensor.momentum_dtype)};
    choice.kernel(tensor.param + offset(tensor.param_dtype), tensor.grad + offset(tensor.grad_dtype), states,
                  end - begin, &hyper);
}

struct Work {
    const KernelTable& kernels;
    std::span<const TensorRef> tensors;
    std::span<const SgdHyper> hypers;
    const StepOptions& options;
    std::int64_t total;
    Staging* staging;  // one for each thread
};

/// The slice of the work that belongs to `thread` of `count`.
void run_slice(void* context, int thread, int count) {
    const Work& work = *static_cast<const Work*>(context);
    // total * thread could overflow; the remainder is spread over the first threads by the second term.
    const std::int64_t share = work.total / count, rest = work.total % count;
    const std::int64_t begin = share * thread + std::min<std::int64_t>(thread, rest);
    const std::int64_t end = begin + share + (thread < rest ? 1 : 0);
    std::int64_t start = 0;  // of the current tensor, in the row of all elements
    for (const TensorRef& tensor : work.tensors) {
        if (start >= end) break;
        const std::int64_t first = cut_at(tensor, begin - start), last = cut_at(tensor, end - start);
        if (first < last) {
            update_range(work.kernels, tensor, work.hypers[tensor.hyper], work.options, work.staging + thread, first,
                         last);
        }
        start += tensor.size;
    }
}

}  // namespace

void run(std::span<const TensorRef> tensors, std::span<const SgdHyper> hypers, const StepOptions& options) {
    std::int64_t total = 0;
    for (const TensorRef& tensor : tensors) total += tensor.size;
    const KernelTable& kernels = *instruction_set().table;
    // num_threads() asks OpenMP, which is not worth it for the smallest steps.
    const std::int64_t worth = total / elements_per_thread;
    const int threads = worth < 2 ? 1 : static_cast<int>(std::min<std::int64_t>(worth, num_threads()));
    if (threads == 1) {
        for (const TensorRef& tensor : tensors) {
            if (tensor.size == 0) continue;
            update_range(kernels, tensor, hypers[tensor.hyper], options, nullptr, 0, tensor.size);
        }
    } else {
        Work work{kernels, tensors, hypers, options, total, staging_for(threads)};
        run_parallel(threads, run_slice, &work);
    }
    if (!options.zero_grad) return;
    for (const TensorRef& tensor : tensors) {
        if (tensor.size > 0 && !tensor.grad_axes.empty() && grad_may_overlap(tensor)) {
            StridedGradient(tensor, 0).clear(tensor.size);
        }
    }
}

}  // namespace sgdcore::cpu
