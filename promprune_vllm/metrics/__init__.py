"""Metrics: the catalog of all metrics, and the only code that writes them."""
