"""``promprune select``: draws which visual tokens of images and videos a server keeps."""
