# The compilers that are built with and tested: GCC 11 or newer, clang 16 or newer.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(oldest 11)
elseif(CMAKE_CXX_COMPILER_ID MATCHES "^(Apple)?Clang$")
  set(oldest 16)
else()
  set(oldest "")
endif()
if(oldest STREQUAL "" OR CMAKE_CXX_COMPILER_VERSION VERSION_LESS oldest)
  message(FATAL_ERROR "sgdcore: GCC 11 or newer or clang 16 or newer is needed; ${CMAKE_CXX_COMPILER} is "
    "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}. CXX, or CMAKE_CXX_COMPILER, names another compiler.")
endif()
