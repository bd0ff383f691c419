"""``promprune bench gpu``: everything that a machine with a GPU is asked for, in a few minutes."""
