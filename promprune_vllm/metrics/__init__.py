"""Metrics: the catalogue of what exists, and the one writer."""
