"""Runs on the CPU what nvcc made of the CUDA kernels: an interpreter of PTX in numpy, and the tests that use it.

`module` reads PTX, `launch` runs a kernel on a grid of threads with the instructions in `operations` and `warp`, and
`program` runs a test program of tests/cuda_on_cpu with all its launches run here.
"""
