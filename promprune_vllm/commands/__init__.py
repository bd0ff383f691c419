"""One module for each command of ``promprune``, named as the command is; ``cli.py`` registers them.

``promprune --help`` imports all of them, so each imports what is heavy only once its command runs.
"""
