"""Builds the tables of README.md and docs/ from the code: ``make docs``. Not part of the wheel."""
