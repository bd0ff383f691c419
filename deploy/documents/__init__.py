"""Builds the tables of README.md and docs/ from the code: ``make docs``. No wheel carries it."""
