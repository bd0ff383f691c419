"""``python -m promprune_vllm`` is ``promprune``."""

from promprune_vllm.cli import main

main()
