"""``promprune select``: pictures of what a server keeps of images."""
