"""Every checkpoint that is shipped or built here, and one that has ids without a name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from promprune_vllm.demo.families import FAMILIES, build_family_model
from promprune_vllm.demo.model import DemoModelSpec, build_demo_model, build_text_model, find_or_build_demo_model
from promprune_vllm.demo.trained import TRAINED

SIGLIP = DemoModelSpec(vision="siglip", image_px=56, hidden=64, heads=2, mlp=128, layers=2)


def exported(directory: Path) -> Path:
    """What the training writes, before its first step."""
    from deploy.training.architecture import new_model
    from deploy.training.export import export

    return export(new_model(0)[0], directory)


CHECKPOINTS: Mapping[str, Callable[[Path], Path]] = {
    **{family: partial(build_family_model, family) for family in FAMILIES},
    "demo": lambda _: find_or_build_demo_model(),
    "siglip": lambda directory: build_demo_model(directory, SIGLIP),
    "text": build_text_model,
    "exported": exported,
    "trained": lambda _: TRAINED,
}
# What writes a checkpoint, and its name above; `tests/engine/test_checkpoints.py` finds one that is not here.
WRITERS = {
    "build_demo_model": ("llava", "demo", "siglip"),
    "build_text_model": ("text",),
    "_build_llava_next": ("llava_next",),
    "build_onevision": ("llava_onevision",),
    "build_next_video": ("llava_next_video",),
    "_build_qwen": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    "build_internvl": ("internvl",),
    "build_internvl_chat": ("internvl_chat",),
    "build_glm": ("glm4v", "glm4v_moe", "glm_ocr"),
    "export": ("exported", "trained"),
}


def with_unnamed_ids(directory: Path) -> Path:
    """Write the trained model with a padded vocabulary, as real ones have it: 384 rows, 343 tokens."""
    shutil.copytree(TRAINED, directory)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if not _unused(token["content"])]
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i for token, i in vocabulary.items() if not _unused(token)}
    file.write_text(json.dumps(content))
    return directory


def _unused(token: str) -> bool:
    return token.startswith("<unused_")
