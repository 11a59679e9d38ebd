// Cuts the work list into one equal part per thread and drives the kernels over each part.
//
// The list is treated as one long row of elements; each thread takes an equal slice of it, whichever tensors that
// covers. Cuts fall on cache lines of the parameter, so no two threads write to the same line, and since
// the rule works element by element, where they fall does not change a bit.
#include "run.hpp"

#include <algorithm>
#include <cstring>
#include <memory>

#include "dispatch.hpp"
#include "threads.hpp"

namespace sgdcore::cpu {
namespace {

constexpr std::int64_t cut_granularity = 64;  // elements; a whole number of cache lines for every dtype

// Below this many elements per thread, waking the thread costs more than it saves.
constexpr std::int64_t elements_per_thread = 32 * 1024;

// Elements that are handled together where a second pass has to find the block's gradient still in the L1 cache.
constexpr std::int64_t block_size = 1024;

/// What a thread makes of a block of gradients before the kernel gets it. On the heap: OpenMP's threads may have stacks
/// of 16 KiB (OMP_STACKSIZE).
struct Scratch {
    alignas(cache_line) std::byte gathered[block_size * sizeof(double)];
    alignas(cache_line) std::byte product[block_size * sizeof(double)];
};

/// Scratch memory for `count` threads of a step that the calling thread takes. The calling thread keeps it for its next
/// steps.
Scratch* scratch_for(int count) {
    thread_local std::unique_ptr<Scratch[]> kept;
    thread_local int kept_count = 0;
    if (kept_count < count) {
        kept = std::make_unique_for_overwrite<Scratch[]>(static_cast<std::size_t>(count));
        kept_count = count;
    }
    return kept.get();
}

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

bool grad_may_overlap(const TensorRef& tensor) { return may_overlap(tensor.grad_axes, item_size(tensor.grad_dtype)); }

/// Walks a strided gradient in the order of its parameter's elements.
class StridedGradient {
  public:
    StridedGradient(const TensorRef& tensor, std::int64_t start)
        : axes_(tensor.grad_axes), item_(item_size(tensor.grad_dtype)), address_(tensor.grad) {
        for (std::size_t axis = axes_.size(); axis-- > 0;) {
            index_[axis] = start % axes_[axis].length;
            start /= axes_[axis].length;
            address_ += index_[axis] * axes_[axis].stride;
        }
    }

    /// Copies the next `count` elements to `target`.
    void gather(std::byte* target, std::int64_t count) {
        walk(count, [&](const std::byte* element) {
            std::memcpy(target, element, item_);
            target += item_;
        });
    }

    /// Zeroes the next `count` elements.
    void clear(std::int64_t count) {
        walk(count, [&](std::byte* element) { std::memset(element, 0, item_); });
    }

  private:
    template <class Visit>
    void walk(std::int64_t count, Visit visit) {
        const std::size_t last = axes_.size() - 1;
        while (count > 0) {
            const std::int64_t run = std::min(count, axes_[last].length - index_[last]);
            for (std::int64_t i = 0; i < run; ++i, address_ += axes_[last].stride) visit(address_);
            count -= run;
            index_[last] += run;
            for (std::size_t axis = last; index_[axis] == axes_[axis].length && axis > 0; --axis) {
                address_ += axes_[axis - 1].stride - axes_[axis].length * axes_[axis].stride;
                index_[axis] = 0;
                ++index_[axis - 1];
            }
        }
    }

    std::span<const Axis> axes_;
    std::size_t item_;
    std::byte* address_;
    std::int64_t index_[max_dimensions];
};

template <class C, class Storage>
void multiply(const std::byte* grad, C factor, std::int64_t count, std::byte* product) {
    for (std::int64_t i = 0; i < count; ++i) {
        reinterpret_cast<C*>(product)[i] = factor * storage::load<Storage, C>(grad, i);
    }
}

/// Writes `factor` times each of the gradient's elements to `product`, rounded to C.
template <class C>
void multiply(DType dtype, const std::byte* grad, C factor, std::int64_t count, std::byte* product) {
    switch (dtype) {
        case DType::float64:
            return multiply<C, storage::Float64>(grad, factor, count, product);
        case DType::float32:
            return multiply<C, storage::Float32>(grad, factor, count, product);
        case DType::float16:
            return multiply<C, storage::Float16>(grad, factor, count, product);
        case DType::bfloat16:
            return multiply<C, storage::BFloat16>(grad, factor, count, product);
    }
}

/// Updates the elements [begin, end) of one tensor. Uses `scratch` if the gradient is strided or scaled.
void update_range(const KernelTable& kernels, const TensorRef& tensor, const SgdHyper& hyper,
                  const StepOptions& options, Scratch* scratch, std::int64_t begin, std::int64_t end) {
    // The kernels know neither strides nor scaled losses: such gradients reach them block by block, through a copy.
    const bool strided = !tensor.grad_axes.empty(), scaled = options.grad_factor != 1;
    const bool in_float64 = scaled && computes_in_float64(tensor.param_dtype, tensor.grad_dtype, tensor.momentum_dtype,
                                                          hyper.momentum != 0);
    const DType grad_dtype = !scaled ? tensor.grad_dtype : in_float64 ? DType::float64 : DType::float32;
    const Kernel kernel =
        kernels.find(tensor.param_dtype, grad_dtype, tensor.momentum_dtype, sgd_variant(hyper, tensor.first));
    const auto param_item = static_cast<std::int64_t>(item_size(tensor.param_dtype));
    const auto grad_item = static_cast<std::int64_t>(item_size(tensor.grad_dtype));
    const auto momentum_item = static_cast<std::int64_t>(item_size(tensor.momentum_dtype));
    const auto update = [&](std::int64_t first, std::int64_t count, const std::byte* grad) {
        std::byte* momentum = tensor.momentum == nullptr ? nullptr : tensor.momentum + first * momentum_item;
        kernel(tensor.param + first * param_item, grad, momentum, count, hyper);
    };
    if (!strided && !scaled && !options.zero_grad) {
        return update(begin, end - begin, tensor.grad + begin * grad_item);
    }

    StridedGradient reader(tensor, begin), cleaner(tensor, begin);
    // An element that others still have to read is cleared by `run`.
    const bool clear = options.zero_grad && !grad_may_overlap(tensor);
    for (std::int64_t first = begin; first < end; first += block_size) {
        const std::int64_t count = std::min(block_size, end - first);
        std::byte* const contiguous = tensor.grad + first * grad_item;
        const std::byte* grad = contiguous;
        if (strided) {
            reader.gather(scratch->gathered, count);
            grad = scratch->gathered;
        }
        if (scaled && in_float64) {
            multiply<double>(tensor.grad_dtype, grad, options.grad_factor, count, scratch->product);
        } else if (scaled) {
            multiply<float>(tensor.grad_dtype, grad, static_cast<float>(options.grad_factor), count, scratch->product);
        }
        update(first, count, scaled ? scratch->product : grad);
        if (clear && strided) {
            cleaner.clear(count);
        } else if (clear) {
            std::memset(contiguous, 0, static_cast<std::size_t>(count * grad_item));
        }
    }
}

struct Work {
    const KernelTable& kernels;
    std::span<const TensorRef> tensors;
    std::span<const SgdHyper> hypers;
    const StepOptions& options;
    std::int64_t total;
    Scratch* scratch;  // one for each thread, if a gradient is strided or scaled
};

/// The slice of the work that belongs to `thread` of `count`.
void run_slice(void* context, int thread, int count) {
    const Work& work = *static_cast<const Work*>(context);
    // total * thread could overflow; the remainder is spread over the first threads by the second term.
    const std::int64_t share = work.total / count, rest = work.total % count;
    const std::int64_t begin = share * thread + std::min<std::int64_t>(thread, rest);
    const std::int64_t end = begin + share + (thread < rest ? 1 : 0);
    Scratch* const scratch = work.scratch == nullptr ? nullptr : work.scratch + thread;
    std::int64_t start = 0;  // of the current tensor, in the row of all elements
    for (const TensorRef& tensor : work.tensors) {
        if (start >= end) break;
        const std::int64_t first = cut_at(tensor, begin - start), last = cut_at(tensor, end - start);
        if (first < last) {
            update_range(work.kernels, tensor, work.hypers[tensor.hyper], work.options, scratch, first, last);
        }
        start += tensor.size;
    }
}

}  // namespace

void run(std::span<const TensorRef> tensors, std::span<const SgdHyper> hypers, const StepOptions& options) {
    std::int64_t total = 0;
    bool needs_scratch = options.grad_factor != 1;
    for (const TensorRef& tensor : tensors) {
        total += tensor.size;
        needs_scratch |= !tensor.grad_axes.empty();
    }
    const KernelTable& kernels = *instruction_set().table;
    // num_threads() asks OpenMP, which is not worth it for the smallest steps.
    const std::int64_t worth = total / elements_per_thread;
    const int threads = worth < 2 ? 1 : static_cast<int>(std::min<std::int64_t>(worth, num_threads()));
    Scratch* const scratch = needs_scratch ? scratch_for(threads) : nullptr;
    if (threads == 1) {
        // Without the cuts, whose divisions the smallest steps notice.
        for (const TensorRef& tensor : tensors) {
            if (tensor.size == 0) continue;
            update_range(kernels, tensor, hypers[tensor.hyper], options, scratch, 0, tensor.size);
        }
    } else {
        Work work{kernels, tensors, hypers, options, total, scratch};
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
