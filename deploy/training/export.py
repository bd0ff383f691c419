"""Writes the trained model as a checkpoint for vLLM and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.training import tokenizer
from promprune_vllm.demo.model import save_checkpoint
from promprune_vllm.demo.random_weights import checkpoint_name


def export(model: Any, directory: Path) -> Path:
    """Write weights (bfloat16), configuration and processor, without the auxiliary heads of training."""
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        checkpoint_name(name, "llava"): parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    model.config.dtype = model.config.text_config.dtype = "bfloat16"
    save_checkpoint(directory, weights, model.config)
    model.config.dtype = model.config.text_config.dtype = "float32"
    tokenizer.processor().save_pretrained(directory)
    return directory
