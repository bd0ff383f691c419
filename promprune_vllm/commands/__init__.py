"""One module per ``promprune`` command, with the same name; ``cli.py`` registers them.

``promprune --help`` imports all of them, so each imports heavy modules only when its command runs.
"""
