"""Code that runs in the engine core: the scheduler's handling of failed images."""
