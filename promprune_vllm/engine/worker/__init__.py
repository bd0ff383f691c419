"""The worker's side: images are encoded and their tokens selected."""
