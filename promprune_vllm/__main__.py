"""``python -m promprune_vllm`` runs the command ``promprune``."""

from promprune_vllm.cli import main

main()
