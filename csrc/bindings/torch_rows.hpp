// The updates of parameters with sparse gradients. Where the rows that the gradient does not name stay as they are,
// each of the others is a tensor of the work list, read and written in place; gradients of one row are added up first.
// Else the gradient is written out with its zeros.
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
    /// What a sparse gradient means for the rows that it does not name: nothing, or zeros.
    enum class Others { stay, have_zeros };

    /// Lists an update, whose gradient are the `indices` and the values that `views` has. The states hold nothing yet
    /// if it is the `first`. A row is what belongs to one index of the first `indices.dimensions` axes. False, with
    /// nothing listed, unless all arrays are in C order on the CPU, of fitting shapes, and the indices in range.
    bool add(const TorchViews& views, const IndexView& indices, std::uint32_t group, bool first, Others others);

    std::span<const TensorRef> tensors() const { return tensors_; }
    std::int64_t elements() const { return elements_; }
    /// What the listed parameters' steps read and write; the owner is the number of the parameter.
    const std::vector<Claim>& claims() const { return claims_; }
    /// How many parameters are listed.
    std::size_t count() const { return count_; }

  private:
    /// A row, the first of its gradients, and the place of their sum among sums; -1 if there is only one.
    struct Row {
        std::int64_t index, entry, sum;
    };
    /// Lists what `tensor` tells for each row, or for all elements with a gradient that has zeros.
    void list_rows(TensorRef tensor, const TorchView& values);
    void list_all(TensorRef tensor, const TorchView& param, const TorchView& values);
    /// Makes `index_of_entry_` the rows by entry, and `rows_` the different ones with their positions by entry if the
    /// others stay. False if an index is out of range.
    bool find_rows(const TorchView& param, const IndexView& indices, Others others);
    /// Adds up the gradients of equal indices in their order and their storage type, as torch's coalesce() does.
    /// Returns the memory of the sums.
    const std::byte* add_up(const TorchView& values, std::int64_t row_size);

    std::vector<TensorRef> tensors_;
    std::int64_t elements_ = 0;
    std::vector<Claim> claims_;
    std::size_t count_ = 0;
    struct Free {
        void operator()(std::byte* memory) const { std::free(memory); }
    };
    std::vector<std::unique_ptr<std::byte, Free>> sums_;  // of gradients

    // Of the parameter under way.
    std::vector<Row> rows_;
    std::vector<std::uint32_t> row_of_entry_;
    std::vector<std::int64_t> index_of_entry_;
    std::vector<std::uint32_t> table_;  // positions in rows_ by the hash of a row's index
    std::int64_t sum_count_ = 0;
};

}  // namespace sgdcore::bindings
