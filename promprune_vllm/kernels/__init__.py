"""Numerical building blocks of the methods, on torch, numba and Triton; independent of the rest of the package."""
