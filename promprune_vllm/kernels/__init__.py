"""Numerical building blocks of the methods: torch, numba and Triton, and nothing of ours."""
