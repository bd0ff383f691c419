"""``promprune plan``: what a budget is worth on a GPU, worked out from a model's config.json alone."""
