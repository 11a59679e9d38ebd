// Cuts the row of all elements into units of a fixed number of blocks. A unit is one thread's; its sum is kept, and the
// units' sums are added in their order at the end.
//
// A block that lies in one gradient is read where it is. One that several gradients share, or whose gradient is strided
// or changed, is put together in a staging buffer first, in float64 if one of the gradients is computed in float64.
#include "squares.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "dispatch.hpp"
#include "strided.hpp"
#include "threads.hpp"

namespace sgdcore::cpu {
namespace {

constexpr std::int64_t blocks_per_unit = 32;
constexpr std::int64_t unit_size = blocks_per_unit * squares_block;

/// A number as a sum of two, of which the second is small.
struct Pair {
    double high = 0, low = 0;

    void add(double value, double rest) {
        const double sum = high + value, back = sum - high;
        low += ((high - (sum - back)) + (value - back)) + rest;
        high = sum;
    }
    double rounded() const { return std::isfinite(high) ? high + low : high; }
};

/// A thread's buffers, on the heap as `Staging`.
struct Block {
    alignas(cache_line) std::byte values[squares_block * sizeof(double)];
    alignas(cache_line) std::byte piece[squares_block * sizeof(double)];
    alignas(cache_line) std::byte gathered[squares_block * sizeof(double)];
};

/// Memory that a thread keeps for its next steps.
template <class T>
T* kept_array(std::size_t count) {
    thread_local std::unique_ptr<T[]> kept;
    thread_local std::size_t kept_count = 0;
    if (kept_count < count) {
        kept = std::make_unique_for_overwrite<T[]>(count);
        kept_count = count;
    }
    return kept.get();
}

bool is_wide(const TensorRef& tensor, const Hyper& hyper) {
    bool wide = tensor.param_dtype == DType::float64 || tensor.grad_dtype == DType::float64;
    for_each_state(hyper.states, [&](int state) { wide = wide || tensor.state_dtypes[state] == DType::float64; });
    return wide;
}

std::int64_t bytes_of(DType dtype, std::int64_t count) { return count * static_cast<std::int64_t>(item_size(dtype)); }

/// The elements of a tensor's gradient.
std::int64_t grad_size(const TensorRef& tensor) { return tensor.grad == nullptr ? 0 : tensor.size; }

struct Work {
    const KernelTable& table;
    std::span<const TensorRef> tensors;
    std::span<const Hyper> hypers;
    const StepOptions& options;
    std::int64_t total, units;
    Pair* sums;     // of each unit
    bool* finite;   // of each thread
    Block* blocks;  // of each thread
};

/// Reads the row of elements, from a position on.
class Row {
  public:
    Row(const Work& work, std::int64_t position, Block& block) : work_(work), block_(block) {
        for (at_ = position; at_ >= grad_size(work.tensors[index_]); ++index_) at_ -= grad_size(work.tensors[index_]);
    }

    /// Adds the squares of the next `count` elements. Returns false if one of them is not finite.
    bool add_squares(std::int64_t count, SquareSums& sums) {
        const TensorRef& tensor = work_.tensors[index_];
        if (at_ + count <= grad_size(tensor) && tensor.grad_axes.empty() && !work_.options.changes_grads()) {
            const std::byte* const grad = tensor.grad + bytes_of(tensor.grad_dtype, at_);
            advance(count);
            return work_.table.add_squares[static_cast<int>(tensor.grad_dtype)](grad, count, sums);
        }
        const bool wide = any_wide(count);
        const std::int64_t item = wide ? sizeof(double) : sizeof(float);
        bool finite = true;
        for (std::int64_t done = 0; done < count;) {
            const std::int64_t size = std::min(count - done, grad_size(work_.tensors[index_]) - at_);
            if (size > 0) finite = put(size, wide, block_.values + done * item) && finite;
            done += size;
            advance(size);
        }
        const DType dtype = wide ? DType::float64 : DType::float32;
        return work_.table.add_squares[static_cast<int>(dtype)](block_.values, count, sums) && finite;
    }

  private:
    void advance(std::int64_t count) {
        at_ += count;
        if (at_ == grad_size(work_.tensors[index_])) {
            at_ = 0;
            ++index_;
        }
    }
    /// True if one of the gradients that the next `count` elements are of is computed in float64.
    bool any_wide(std::int64_t count) const {
        bool wide = false;
        count += at_;
        for (std::size_t i = index_; count > 0; ++i) {
            if (grad_size(work_.tensors[i]) > 0)
                wide = wide || is_wide(work_.tensors[i], work_.hypers[work_.tensors[i].hyper]);
            count -= grad_size(work_.tensors[i]);
        }
        return wide;
    }
    /// Writes the next elements of one gradient, as the step uses them. Returns false if one is not finite and is
    /// limited.
    bool put(std::int64_t count, bool wide, std::byte* to) {
        const TensorRef& tensor = work_.tensors[index_];
        const std::byte* grad = tensor.grad + bytes_of(tensor.grad_dtype, at_);
        if (!tensor.grad_axes.empty()) {
            StridedGradient(tensor, at_).gather(block_.gathered, count);
            grad = block_.gathered;
        }
        const auto decode = [&](DType dtype, bool to_float64) {
            return work_.table.decode[static_cast<int>(dtype)][to_float64];
        };
        if (!work_.options.changes_grads()) {
            decode(tensor.grad_dtype, wide)(grad, count, to);
            return true;
        }
        const bool in_float64 = is_wide(tensor, work_.hypers[tensor.hyper]);
        bool finite = true;
        decode(tensor.grad_dtype, in_float64)(grad, count, block_.piece);
        if (work_.options.grad_factor != 1) {
            work_.table.scale[in_float64](block_.piece, count, work_.options.grad_factor, block_.piece);
        }
        if (work_.options.limits_grads()) {
            finite = work_.table.clamp[in_float64](block_.piece, count, work_.options.clip_value, block_.piece);
        }
        decode(in_float64 ? DType::float64 : DType::float32, wide)(block_.piece, count, to);
        return finite;
    }

    const Work& work_;
    Block& block_;
    std::size_t index_ = 0;
    std::int64_t at_ = 0;  // in the tensor
};

/// Adds the lanes in a fixed order.
Pair sum_of(SquareSums& sums) {
    for (int half = squares_lanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
            Pair pair{sums.high[lane], sums.low[lane]};
            pair.add(sums.high[lane + half], sums.low[lane + half]);
            sums.high[lane] = pair.high;
            sums.low[lane] = pair.low;
        }
    }
    return {sums.high[0], sums.low[0]};
}

void sum_units(void* context, int thread, int count) {
    const Work& work = *static_cast<const Work*>(context);
    const std::int64_t begin = work.units * thread / count, end = work.units * (thread + 1) / count;
    bool finite = true;
    if (begin < end) {
        Row row(work, begin * unit_size, work.blocks[thread]);
        for (std::int64_t unit = begin; unit < end; ++unit) {
            SquareSums sums{};
            const std::int64_t last = std::min((unit + 1) * unit_size, work.total);
            for (std::int64_t at = unit * unit_size; at < last; at += squares_block) {
                finite = row.add_squares(std::min(squares_block, last - at), sums) && finite;
            }
            work.sums[unit] = sum_of(sums);
        }
    }
    work.finite[thread] = finite;
}

}  // namespace

Squares squares_of(std::span<const TensorRef> tensors, std::span<const Hyper> hypers, const StepOptions& options) {
    std::int64_t total = 0;
    for (const TensorRef& tensor : tensors) total += grad_size(tensor);
    if (total == 0) return {};
    const std::int64_t units = (total + unit_size - 1) / unit_size;
    const int threads = units < 2 ? 1 : static_cast<int>(std::min<std::int64_t>(units, num_threads()));
    Work work{*instruction_set().table,
              tensors,
              hypers,
              options,
              total,
              units,
              kept_array<Pair>(static_cast<std::size_t>(units)),
              kept_array<bool>(static_cast<std::size_t>(threads)),
              kept_array<Block>(static_cast<std::size_t>(threads))};
    for (int thread = 0; thread < threads; ++thread) work.finite[thread] = true;  // OpenMP may grant fewer threads
    run_parallel(threads, sum_units, &work);
    Pair sum;
    for (std::int64_t unit = 0; unit < units; ++unit) sum.add(work.sums[unit].high, work.sums[unit].low);
    return {sum.rounded(), std::all_of(work.finite, work.finite + threads, [](bool finite) { return finite; })};
}

namespace {

struct Products {
    const KernelTable& table;
    std::span<const TensorRef> tensors;
    double factor;
    std::int64_t total;
    Block* blocks;  // of each thread
};

/// Multiplies the elements [begin, end) of one gradient.
void scale_range(const Products& work, const TensorRef& tensor, Block& block, std::int64_t begin, std::int64_t end) {
    const int type = static_cast<int>(tensor.grad_dtype);
    const bool wide = tensor.grad_dtype == DType::float64, strided = !tensor.grad_axes.empty();
    for (std::int64_t start = begin; start < end; start += squares_block) {
        const std::int64_t count = std::min(squares_block, end - start);
        std::byte* const grad = strided ? block.gathered : tensor.grad + bytes_of(tensor.grad_dtype, start);
        if (strided) StridedGradient(tensor, start).gather(grad, count);
        work.table.decode[type][wide](grad, count, block.values);
        work.table.scale[wide](block.values, count, work.factor, block.values);
        work.table.encode[type][wide](block.values, count, grad);
        if (strided) StridedGradient(tensor, start).scatter(grad, count);
    }
}

void scale_slice(void* context, int thread, int count) {
    const Products& work = *static_cast<const Products*>(context);
    const std::int64_t units = (work.total + unit_size - 1) / unit_size;
    const std::int64_t begin = units * thread / count * unit_size, end = units * (thread + 1) / count * unit_size;
    std::int64_t start = 0;  // of the tensor, in the row of all elements
    for (const TensorRef& tensor : work.tensors) {
        const std::int64_t from = std::max<std::int64_t>(begin - start, 0), to = std::min(end - start, tensor.size);
        if (from < to) scale_range(work, tensor, work.blocks[thread], from, to);
        start += tensor.size;
    }
}

}  // namespace

void scale_grads(std::span<const TensorRef> tensors, double factor) {
    std::int64_t total = 0;
    for (const TensorRef& tensor : tensors) total += grad_size(tensor);
    const std::int64_t units = (total + unit_size - 1) / unit_size;
    const int threads = units < 2 ? 1 : static_cast<int>(std::min<std::int64_t>(units, num_threads()));
    Products work{*instruction_set().table, tensors, factor, total,
                  kept_array<Block>(static_cast<std::size_t>(threads))};
    run_parallel(threads, scale_slice, &work);
}

void clear_grads(std::span<const TensorRef> tensors) {
    for (const TensorRef& tensor : tensors) {
        if (grad_size(tensor) == 0) continue;
        if (tensor.grad_axes.empty()) {
            std::memset(tensor.grad, 0, static_cast<std::size_t>(bytes_of(tensor.grad_dtype, tensor.size)));
        } else {
            StridedGradient(tensor, 0).clear(tensor.size);
        }
    }
}

}  // namespace sgdcore::cpu
