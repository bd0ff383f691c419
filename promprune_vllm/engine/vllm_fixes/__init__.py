"""Faults of vLLM's that are gone around; each file goes when vLLM mends its fault."""
