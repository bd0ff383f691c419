"""Code that runs in the worker.

A batch of images passes ``pruned_model`` (called by vLLM), ``encode`` (the loop), ``fault_isolation`` (if an image
fails), a family's ``capture`` (``encoded_image``), ``selected_tokens`` (the rows that are kept) and, for M-RoPE,
``mrope`` (their positions).
"""
