"""Benchmarks: kernels, prefill, servers under load or for hours, and adapting to content."""
