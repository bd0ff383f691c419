"""Writing the trained model as a checkpoint that vLLM and transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from promprune_vllm.demo.model import checkpoint_name
from promprune_vllm.demo.training import tokenizer


def export(model: Any, directory: Path) -> Path:
    """Write weights (bfloat16), configuration and processor; the heads of the training are left behind."""
    import torch
    from safetensors.torch import save
    from transformers import GenerationConfig

    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        checkpoint_name(name, "llava"): parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    # Not save_file: it makes a file that only its owner can read, useless to a server in a container.
    (directory / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    model.config.dtype = model.config.text_config.dtype = "bfloat16"
    model.config.save_pretrained(directory)
    model.config.dtype = model.config.text_config.dtype = "float32"
    roles = {"pad_token_id": tokenizer.PAD_ID, "bos_token_id": tokenizer.BOS_ID, "eos_token_id": tokenizer.EOS_ID}
    GenerationConfig(**roles).save_pretrained(directory)
    tokenizer.processor().save_pretrained(directory)
    return directory
