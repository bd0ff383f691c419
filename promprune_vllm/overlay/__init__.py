"""``promprune select``: draws which visual tokens of images a server keeps."""
