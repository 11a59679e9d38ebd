# The CUDA module, in a file of its own: _core works without it, and does not link CUDA.
include(CheckLanguage)
if(SGDCORE_CUDA STREQUAL "AUTO")
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(STATUS "sgdcore: no CUDA compiler was found; the CUDA module is left out")
    return()
  endif()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # they are chosen below, by what the compiler knows
  set(default_architectures TRUE)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
if(CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12)
  message(FATAL_ERROR "sgdcore needs CUDA 12 or newer, got ${CMAKE_CUDA_COMPILER_VERSION} (-DSGDCORE_CUDA=OFF leaves it out)")
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
