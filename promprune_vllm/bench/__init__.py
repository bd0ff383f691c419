"""Measurements anybody can repeat: kernels, servers under load, and what adapting to content is worth."""
