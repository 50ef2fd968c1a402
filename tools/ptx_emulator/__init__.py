"""Runs the PTX that Triton and nvcc emit, in numpy, on a CPU."""
