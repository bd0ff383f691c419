"""Code that runs in the worker: images are encoded and their tokens selected."""
