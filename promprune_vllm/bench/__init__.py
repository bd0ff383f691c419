"""Measurements anybody can repeat: servers under load, and what adapting to content is worth."""
