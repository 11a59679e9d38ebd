// The updates of parameters with sparse gradients. Where the rows without a gradient stay as they are, each row with
// one is a tensor of the work list, read and written in place; several gradients of one row are added up first.
// Otherwise the gradient is written out as a dense one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "../extents.hpp"
#include "../work.hpp"
#include "torch_listing.hpp"
#include "torch_reader.hpp"

namespace sgdcore::bindings {

class TorchRows {
  public:
    /// What a step does to the rows without a gradient: nothing, or an update with a gradient of zeros.
    enum class Others { stay, have_zeros };

    /// Lists an update. The gradient has the indices `indices` and the values of `operands`. A row has one index along
    /// each of the first `indices.dimensions` axes. Returns false, with nothing listed, unless all arrays are in C
    /// order on the CPU, their shapes fit, and the indices are in range.
    bool add(const TorchOperands& operands, const IndexView& indices, std::uint32_t group, bool first_step,
             Others others);

    std::span<const TensorRef> tensors() const { return tensors_; }
    std::int64_t elements() const { return elements_; }
    /// The memory that the listed parameters' steps read and write; the owner is the number of the parameter.
    const std::vector<Claim>& claims() const { return claims_; }
    /// How many parameters are listed.
    std::size_t count() const { return count_; }

  private:
    /// A row: its index, the first entry that names it, and the number of its sum; -1 if it has one gradient.
    struct Row {
        std::int64_t index, entry, sum;
    };
    /// Lists each row of the tensor.
    void list_rows(TensorRef tensor, const TorchView& values);
    /// Lists the whole tensor, with a dense gradient.
    void list_all(TensorRef tensor, const TorchView& param, const TorchView& values);
    /// Fills `index_of_entry_`, and `rows_` and `row_of_entry_` if the others stay. Returns false if an index is out of
    /// range.
    bool find_rows(const TorchView& param, const IndexView& indices, Others others);
    /// Adds up the gradients of each row in their order and storage type, as torch's coalesce() does. Returns the sums.
    const std::byte* add_up(const TorchView& values, std::int64_t row_size);

    std::vector<TensorRef> tensors_;
    std::int64_t elements_ = 0;
    std::vector<Claim> claims_;
    std::size_t count_ = 0;
    struct Free {
        void operator()(std::byte* memory) const { std::free(memory); }
    };
    std::vector<std::unique_ptr<std::byte, Free>> sums_;  // memory of gradients that were added up

    // Of the parameter that is being added.
    std::vector<Row> rows_;
    std::vector<std::uint32_t> row_of_entry_;
    std::vector<std::int64_t> index_of_entry_;
    std::vector<std::uint32_t> table_;  // a hash table of rows_ by their index
    std::int64_t sum_count_ = 0;
};

}  // namespace sgdcore::bindings
