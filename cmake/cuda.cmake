# The CUDA module, in a file of its own: _core works without it, and does not link CUDA.

# Ends this file with a message: an error if the module is asked for, else only a line.
macro(sgdcore_without_cuda reason)
  if(NOT SGDCORE_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "sgdcore: SGDCORE_CUDA=${SGDCORE_CUDA}, but ${reason}")
  endif()
  message(STATUS "sgdcore: the CUDA module is left out: ${reason}")
  return()
endmacro()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  sgdcore_without_cuda("no CUDA compiler was found that works with ${CMAKE_CXX_COMPILER}")
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # they are chosen below, by what the compiler knows
  set(default_architectures TRUE)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12)
  sgdcore_without_cuda("CUDA 12 or newer is needed, and this is ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
find_package(CUDAToolkit)
if(NOT TARGET CUDA::cudart_static)
  sgdcore_without_cuda("the static CUDA runtime was not found")
endif()

# The flags that keep the numbers (CMakeLists.txt) are the last on the command line, where the last one counts. Only what
# the environment appends comes later, and what goes to the host's compiler is not undone there.
string(TOUPPER "${CMAKE_BUILD_TYPE}" config)
set(host_flags "${CMAKE_CUDA_FLAGS} ${CMAKE_CUDA_FLAGS_${config}} $ENV{NVCC_PREPEND_FLAGS} $ENV{NVCC_APPEND_FLAGS}")
if("$ENV{NVCC_APPEND_FLAGS}" MATCHES "use_fast_math|ftz|prec-div|prec-sqrt|fmad" OR
   host_flags MATCHES "-Ofast|-f[a-z-]*-math|-fno-signed-zeros|-mdaz-ftz")
  message(FATAL_ERROR "sgdcore: '${CMAKE_MATCH_0}' among CUDA's flags changes the values that arithmetic gives, and the "
    "build cannot take it back. Leave it out of CUDAFLAGS (CMAKE_CUDA_FLAGS is '${CMAKE_CUDA_FLAGS}') and of "
    "NVCC_APPEND_FLAGS ('$ENV{NVCC_APPEND_FLAGS}').")
endif()

# Machine code for these, where the compiler knows them, and PTX of one, which drivers compile for all later ones.
if(default_architectures)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  set(CMAKE_CUDA_ARCHITECTURES "")
  foreach(architecture 75-real 80-real 86-real 89-real 90 100-real 120-real)
    string(REPLACE "-real" "" number ${architecture})
    if(known MATCHES "compute_${number}[^0-9]")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${architecture})
    endif()
  endforeach()
endif()

list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
pybind11_add_module(_cuda csrc/bindings/cuda_module.cpp csrc/cuda/cudart.cpp csrc/cuda/kernel.cu)
target_include_directories(_cuda PRIVATE csrc)
target_link_libraries(_cuda PRIVATE sgdcore_options CUDA::cudart_static)
target_compile_definitions(_cuda PRIVATE
  "SGDCORE_CUDA_COMPILER=\"${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}\""
  "SGDCORE_CUDA_ARCHITECTURES=\"${architectures}\"")
install(TARGETS _cuda DESTINATION sgdcore)
