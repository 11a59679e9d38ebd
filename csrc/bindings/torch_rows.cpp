// Sparse gradients, row by row.
#include "torch_rows.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>

#include "torch_listing.hpp"

namespace sgdcore::bindings {
namespace {

Claim claim_of(const TorchView& view, std::size_t owner, bool written) {
    const auto bytes = static_cast<std::uintptr_t>(size_of(view)) * item_size(view.dtype);
    return {extent_at(view.data, bytes), owner, written};
}

/// sum += gradient, element by element, each result rounded to the storage type.
template <class Storage, class Compute>
void add_elements(std::byte* sum, const std::byte* gradient, std::int64_t size) {
    using storage::load, storage::store;
    for (std::int64_t i = 0; i < size; ++i) {
        store<Storage>(sum, i, load<Storage, Compute>(sum, i) + load<Storage, Compute>(gradient, i));
    }
}

void add_to(DType dtype, std::byte* sum, const std::byte* gradient, std::int64_t size) {
    storage::with_storage(dtype, [&]<class Storage>(Storage) {
        add_elements<Storage, storage::ComputeType<Storage>>(sum, gradient, size);
    });
}

}  // namespace

bool TorchRows::add(const TorchOperands& operands, const IndexView& indices, std::uint32_t group, bool first_step,
                    Others others) {
    const TorchView &param = operands.param, &values = operands.grad;
    const auto sparse = static_cast<int>(indices.dimensions);
    if (sparse < 1 || sparse > param.dimensions || values.dimensions != 1 + param.dimensions - sparse ||
        !std::equal(param.shape + sparse, param.shape + param.dimensions, values.shape + 1)) {
        return false;
    }
    if (param.device != cpu_device || !in_c_order(param) || !in_c_order(values)) return false;
    bool fits = true;
    operands.for_each_state([&](int state) {
        const TorchView& s = operands.states[state];
        fits = fits && s.device == cpu_device && in_c_order(s) &&
               std::equal(param.shape, param.shape + param.dimensions, s.shape, s.shape + s.dimensions);
    });
    if (!fits || !find_rows(param, indices, others)) return false;
    TensorRef tensor;
    tensor.size = 1;
    for (int axis = sparse; axis < param.dimensions; ++axis) tensor.size *= param.shape[axis];
    tensor.hyper = group;
    tensor.param = param.data;
    tensor.param_dtype = param.dtype;
    tensor.grad_dtype = values.dtype;
    tensor.first_step = first_step;
    operands.for_each_state([&](int state) {
        tensor.states[state] = operands.states[state].data;
        tensor.state_dtypes[state] = operands.states[state].dtype;
    });
    if (size_of(param) > 0) {
        if (param.data == nullptr || (size_of(values) > 0 && values.data == nullptr)) return false;
        others == Others::stay ? list_rows(tensor, values) : list_all(tensor, param, values);
    }
    claims_.push_back(claim_of(param, count_, true));
    operands.for_each_state([&](int state) { claims_.push_back(claim_of(operands.states[state], count_, true)); });
    claims_.push_back(claim_of(values, count_, false));
    ++count_;
    return true;
}

void TorchRows::list_rows(TensorRef tensor, const TorchView& values) {
    const auto bytes = [&](DType dtype) { return tensor.size * static_cast<std::int64_t>(item_size(dtype)); };
    const std::byte* const sums = add_up(values, tensor.size);
    const TensorRef whole = tensor;
    for (const Row& row : rows_) {
        tensor.param = whole.param + row.index * bytes(tensor.param_dtype);
        for (int state = 0; state < max_states; ++state) {
            if (whole.states[state] == nullptr) continue;
            tensor.states[state] = whole.states[state] + row.index * bytes(tensor.state_dtypes[state]);
        }
        const std::byte* const grad =
            row.sum < 0 ? values.data + row.entry * bytes(values.dtype) : sums + row.sum * bytes(values.dtype);
        tensor.grad = const_cast<std::byte*>(grad);
        tensors_.push_back(tensor);
    }
    elements_ += static_cast<std::int64_t>(rows_.size()) * tensor.size;
}

void TorchRows::list_all(TensorRef tensor, const TorchView& param, const TorchView& values) {
    const std::int64_t row_size = tensor.size, bytes = row_size * static_cast<std::int64_t>(item_size(values.dtype));
    tensor.size = size_of(param);
    auto* const zeros =
        static_cast<std::byte*>(std::calloc(static_cast<std::size_t>(tensor.size), item_size(values.dtype)));
    if (zeros == nullptr) throw std::bad_alloc();
    sums_.emplace_back(zeros);
    for (std::size_t entry = 0; entry < index_of_entry_.size(); ++entry) {
        add_to(values.dtype, zeros + index_of_entry_[entry] * bytes,
               values.data + static_cast<std::int64_t>(entry) * bytes, row_size);
    }
    tensor.grad = zeros;
    tensors_.push_back(tensor);
    elements_ += tensor.size;
}

bool TorchRows::find_rows(const TorchView& param, const IndexView& indices, Others others) {
    index_of_entry_.clear();
    for (std::int64_t entry = 0; entry < indices.entries; ++entry) {
        std::int64_t index = 0;
        for (std::int64_t axis = 0; axis < indices.dimensions; ++axis) {
            const std::int64_t along = indices.data[axis * indices.dimension_stride + entry * indices.entry_stride];
            if (along < 0 || along >= param.shape[axis]) return false;
            index = index * param.shape[axis] + along;
        }
        index_of_entry_.push_back(index);
    }
    if (others == Others::have_zeros) return true;

    constexpr std::uint32_t none = UINT32_MAX;
    if (indices.entries >= none) return false;
    rows_.clear();
    row_of_entry_.clear();
    sum_count_ = 0;
    // Open addressing, at most half full.
    table_.assign(std::bit_ceil(2 * index_of_entry_.size() + 2), none);
    const int shift = 64 - std::countr_zero(table_.size());
    for (std::size_t entry = 0; entry < index_of_entry_.size(); ++entry) {
        const std::int64_t index = index_of_entry_[entry];
        std::size_t place = (static_cast<std::uint64_t>(index) * 0x9E3779B97F4A7C15u) >> shift;
        while (table_[place] != none && rows_[table_[place]].index != index) place = (place + 1) % table_.size();
        if (table_[place] == none) {
            table_[place] = static_cast<std::uint32_t>(rows_.size());
            rows_.push_back({index, static_cast<std::int64_t>(entry), -1});
        } else if (Row& row = rows_[table_[place]]; row.sum < 0) {
            row.sum = sum_count_++;
        }
        row_of_entry_.push_back(table_[place]);
    }
    return true;
}

const std::byte* TorchRows::add_up(const TorchView& values, std::int64_t row_size) {
    if (sum_count_ == 0) return nullptr;
    const auto bytes = static_cast<std::size_t>(row_size) * item_size(values.dtype);
    auto* const sums = static_cast<std::byte*>(std::malloc(static_cast<std::size_t>(sum_count_) * bytes));
    if (sums == nullptr) throw std::bad_alloc();
    sums_.emplace_back(sums);
    for (std::size_t entry = 0; entry < row_of_entry_.size(); ++entry) {
        const Row& row = rows_[row_of_entry_[entry]];
        if (row.sum < 0) continue;
        std::byte* const sum = sums + static_cast<std::size_t>(row.sum) * bytes;
        const std::byte* const gradient = values.data + entry * bytes;
        if (static_cast<std::int64_t>(entry) == row.entry) {
            std::memcpy(sum, gradient, bytes);
        } else {
            add_to(values.dtype, sum, gradient, row_size);
        }
    }
    return sums;
}

}  // namespace sgdcore::bindings
