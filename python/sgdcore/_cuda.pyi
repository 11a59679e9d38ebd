"""Types of the module that brings the CUDA runtime. It exists if sgdcore was built with a CUDA compiler."""

runtime: object
compiler: str
architectures: str
