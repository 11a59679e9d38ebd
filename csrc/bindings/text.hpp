// Texts of Python objects for error messages: valid UTF-8, whatever an object's repr does.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <limits>
#include <string>

namespace sgdcore::bindings {

/// A str in UTF-8. A lone surrogate, which UTF-8 lacks, becomes its escape sequence.
std::string utf8(pybind11::handle text);

/// The name of the object's type.
std::string type_name(pybind11::handle object);

/// repr(object), cut after `limit` characters. "<T object>" stands for an object whose repr raises, such as an integer
/// of too many digits.
std::string repr_text(pybind11::handle object, std::size_t limit = std::numeric_limits<std::size_t>::max());

}  // namespace sgdcore::bindings
