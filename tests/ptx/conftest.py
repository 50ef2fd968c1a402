"""A PTX machine in numpy: runs what compilers make for a GPU where there is none. See tests/gpu_kernels/conftest.py."""
