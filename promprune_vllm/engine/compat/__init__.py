"""What this release needs of vLLM, and how its minors differ."""
