# libgomp, GCC's OpenMP runtime, with every compiler: csrc/cpu/threads.cpp says why. Clang looks for it where GCC has it.
add_library(sgdcore_libgomp INTERFACE IMPORTED)
find_package(Threads REQUIRED)
set_target_properties(sgdcore_libgomp PROPERTIES INTERFACE_LINK_LIBRARIES "gomp;Threads::Threads")
try_compile(SGDCORE_LIBGOMP
  SOURCE_FROM_CONTENT libgomp.cpp "extern \"C\" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
    int main() { GOMP_parallel([](void*) {}, nullptr, 2, 0); }"
  NO_CACHE
  LINK_LIBRARIES sgdcore_libgomp
  OUTPUT_VARIABLE output)
if(NOT SGDCORE_LIBGOMP)
  message(FATAL_ERROR "sgdcore: GCC's OpenMP runtime, libgomp, is needed with every compiler (Debian: a package "
    "libgcc-12-dev or the like, which g++ brings). Linking it failed:\n${output}")
endif()
