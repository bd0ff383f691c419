"""Workarounds for bugs in vLLM. Each file can be deleted once vLLM fixes its bug."""
