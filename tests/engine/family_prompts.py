"""Names of the families whose tiny checkpoints are tested, and prompts for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from promprune_vllm.demo import photo_path

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
LLAVA_VIDEO = ("llava_onevision", "llava_next_video")
INTERNVL = ("internvl", "internvl_chat")
GLM = ("glm4v", "glm4v_moe", "glm_ocr")
PHOTO = {"type": "image"}
VIDEO = {"type": "video"}
TEXT = {"type": "text", "text": "What?"}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
]


@cache
def processor_of(directory: Path) -> Any:
    """A checkpoint's processor, or its tokenizer if that is all that transformers has for it."""
    from transformers import AutoProcessor, AutoTokenizer

    has_own = (directory / "processor_config.json").is_file()
    return (AutoProcessor if has_own else AutoTokenizer).from_pretrained(directory)


def photo(name: str) -> Image.Image:
    with Image.open(photo_path(name)) as image:
        return image.convert("RGB")


def prompt(processor: Any, *parts: dict[str, str]) -> str:
    talk = [{"role": "user", "content": list(parts)}]
    return str(processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False))
