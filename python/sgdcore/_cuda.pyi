"""Types of the module that brings the CUDA runtime. It is there if a CUDA compiler was, when sgdcore was built."""

runtime: object
compiler: str
architectures: str
