# Keeps the numbers the same whatever flags a build is given: CXXFLAGS and LDFLAGS, CMAKE_CXX_FLAGS, a toolchain file.
#
# The target sgdcore_numerics takes back every flag that changes what arithmetic gives. Options of a target stand behind
# all of those, and the last one counts. A program that is compiled and linked in this way is then run, for what was
# overlooked or comes later still: a compiler's wrapper, its configuration, a linked object. CUDA's flags are refused
# by name (cmake/cuda.cmake).

set(float_options
  -fno-fast-math
  -fno-unsafe-math-optimizations
  -fno-associative-math
  -fno-reciprocal-math
  -fno-finite-math-only
  -fsigned-zeros)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND float_options -fno-single-precision-constant -fno-allow-store-data-races)
else()
  list(APPEND float_options -fno-approx-func -fdenormal-fp-math=ieee -ffp-eval-method=source)
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND float_options -mfpmath=sse)
endif()
# The last: no contraction of a * b + c.
list(APPEND float_options -ffp-contract=off)

# -ffast-math, -Ofast and -mdaz-ftz at the link add a start-up file that makes the whole process flush subnormal numbers.
set(float_link_options -fno-fast-math -fno-unsafe-math-optimizations -O3)
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-mno-daz-ftz SGDCORE_HAS_NO_DAZ_FTZ)
if(SGDCORE_HAS_NO_DAZ_FTZ)
  list(APPEND float_link_options -mno-daz-ftz)
endif()

# Imported, because only such targets reach try_run.
add_library(sgdcore_numerics INTERFACE IMPORTED)
set_target_properties(sgdcore_numerics PROPERTIES
  INTERFACE_COMPILE_OPTIONS "$<$<COMPILE_LANGUAGE:CXX>:${float_options}>"
  INTERFACE_LINK_OPTIONS "${float_link_options}")

function(sgdcore_check_numerics)
  string(TOUPPER "${CMAKE_BUILD_TYPE}" config)
  set(CMAKE_TRY_COMPILE_CONFIGURATION "${CMAKE_BUILD_TYPE}")
  set(link_flags "")
  foreach(kind EXE MODULE SHARED)
    string(APPEND link_flags " ${CMAKE_${kind}_LINKER_FLAGS} ${CMAKE_${kind}_LINKER_FLAGS_${config}}")
  endforeach()
  get_directory_property(directory_options COMPILE_OPTIONS)
  get_directory_property(directory_link_options LINK_OPTIONS)
  set(arguments
    SOURCES "${PROJECT_SOURCE_DIR}/cmake/numerics_check.cpp"
    NO_CACHE
    CMAKE_FLAGS "-DINCLUDE_DIRECTORIES=${PROJECT_SOURCE_DIR}/csrc" "-DCMAKE_EXE_LINKER_FLAGS=${link_flags}"
    COMPILE_DEFINITIONS ${directory_options}
    LINK_OPTIONS ${directory_link_options}
    LINK_LIBRARIES sgdcore_numerics)
  if(CMAKE_CROSSCOMPILING AND NOT CMAKE_CROSSCOMPILING_EMULATOR)
    try_compile(compiled ${arguments} OUTPUT_VARIABLE compiler_output)
    set(status 0)
  else()
    try_run(status compiled ${arguments} COMPILE_OUTPUT_VARIABLE compiler_output RUN_OUTPUT_VARIABLE output)
  endif()
  set(advice "Leave out the flags that do so. CMAKE_CXX_FLAGS is '${CMAKE_CXX_FLAGS}', those of ${CMAKE_BUILD_TYPE} "
    "'${CMAKE_CXX_FLAGS_${config}}', the linker's '${link_flags}'; other places are a compiler's wrapper or "
    "configuration (${CMAKE_CXX_COMPILER}).")
  string(CONCAT advice ${advice})
  if(NOT compiled)
    message(FATAL_ERROR "sgdcore: a small program that checks floating-point arithmetic does not build:\n"
      "${compiler_output}\nIf an #error above says that a flag changes values: ${advice}")
  elseif(NOT status STREQUAL 0)
    message(FATAL_ERROR "sgdcore: this compiler, with these flags, changes the values that floating-point arithmetic "
      "gives, and the build cannot take that back:\n${output}\n${advice}")
  endif()
endfunction()
sgdcore_check_numerics()
