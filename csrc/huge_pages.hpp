// Transparent huge pages: fewer translations of addresses in every pass over memory.
#pragma once

#include <cstddef>
#include <vector>

#include "extents.hpp"

namespace sgdcore {

inline constexpr std::size_t huge_page = std::size_t{2} << 20;  // bytes

/// Advises the system to use huge pages for the part of a range that fills whole ones, when it is first touched.
void advise_huge_pages(void* begin, std::size_t size);

/// Moves memory that is in use to huge pages, at the same addresses, where the ranges fill such pages but for small
/// gaps. Does nothing where the system cannot (Linux before 6.1), or is set to use no huge pages.
void collapse_huge_pages(std::vector<Extent> ranges);

}  // namespace sgdcore
