// The extension module sgdcore._cuda: hands the CUDA runtime to sgdcore._core, which links none.
#include <pybind11/pybind11.h>

#include <string>

#include "../cuda/cudart.hpp"

PYBIND11_MODULE(_cuda, module) {
    namespace py = pybind11;
    using sgdcore::cuda::Runtime;
    module.attr("runtime") = py::capsule(&sgdcore::cuda::cuda_runtime(), Runtime::capsule_name);
    module.attr("compiler") = std::string(SGDCORE_CUDA_COMPILER);
    module.attr("architectures") = std::string(SGDCORE_CUDA_ARCHITECTURES);
}
