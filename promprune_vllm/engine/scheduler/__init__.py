"""The engine core's side."""
