"""What this release needs from vLLM, and how vLLM's minors differ."""
