// Transparent huge pages: fewer translations of addresses in every pass over memory.
#pragma once

#include <cstddef>
#include <vector>

#include "extents.hpp"

namespace sgdcore {

inline constexpr std::size_t huge_page = std::size_t{2} << 20;  // bytes

/// Asks the system to put the whole huge pages within a range on such pages, as they are touched.
void advise_huge_pages(void* begin, std::size_t size);

/// Puts memory that is in use on huge pages, at the same addresses: those that the ranges fill but for small gaps.
/// Where the system cannot (Linux before 6.1), or is set never to, nothing happens.
void collapse_huge_pages(std::vector<Extent> ranges);

}  // namespace sgdcore
