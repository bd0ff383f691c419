"""Numerical building blocks of the methods: torch only, nothing of ours."""
