"""``promprune plan``: what a budget saves on a GPU, computed from a model's config.json alone."""
