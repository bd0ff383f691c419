"""Build stand-ins for what vLLM's tests would download: `vllm_tests_stand_ins.py FOLDER`, in vLLM's environment.

They are our tiny checkpoints under the Hugging Face names that the tests use, in the layout of the hub's cache,
and pictures and a video under the names of vLLM's assets. Tests that need the real ones fail with and without the
plugin.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from promprune_vllm.demo import photo_path
from promprune_vllm.demo.families import build_family_model
from promprune_vllm.demo.model import build_text_model

FAMILIES: Mapping[str, str] = {
    "llava-hf/llava-1.5-7b-hf": "llava",
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": "llava",  # for tests of caches, where any image model will do
    "llava-hf/llava-v1.6-mistral-7b-hf": "llava_next",
    "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl",
}
TEXT = (
    *("facebook/opt-125m", "facebook/opt-350m", "openai-community/gpt2", "distilbert/distilgpt2"),
    *("Qwen/Qwen3-0.6B", "Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
    *("HuggingFaceH4/zephyr-7b-beta", "hmellor/tiny-random-LlamaForCausalLM"),
)
PICTURES = {
    "2560px-Gfp-wisconsin-madison-the-nature-boardwalk.jpg": "RGB",
    "Grayscale_8bits_palette_sample_image.png": "P",
    "1280px-Venn_diagram_rgb.svg.png": "RGB",
    "RGBA_comp.png": "RGBA",
    "stop_sign.jpg": "RGB",
    "cherry_blossom.jpg": "RGB",
}
VIDEO, FRAMES, SIDE = "sample_demo_1.mp4", 40, 64
POSITIONS = 32_768  # the tests' prompts are longer than our models' contexts
_REVISION = "0" * 40


def publish(checkpoint: Path, hub: Path, name: str) -> None:
    """Put a checkpoint into a hub cache."""
    entry = hub / f"models--{name.replace('/', '--')}"
    snapshot = entry / "snapshots" / _REVISION
    shutil.copytree(checkpoint, snapshot)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(_REVISION)
    config = json.loads((snapshot / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        if "max_position_embeddings" in part:
            part["max_position_embeddings"] = POSITIONS
    (snapshot / "config.json").write_text(json.dumps(config, indent=2))


def film(file: Path) -> None:
    """Write a short video that fades from black to white."""
    import cv2
    import numpy as np

    file.parent.mkdir(parents=True)
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), 8.0, (SIDE, SIDE))
    for number in range(FRAMES):
        writer.write(np.full((SIDE, SIDE, 3), 6 * number, dtype=np.uint8))
    writer.release()


def main(folder: Path) -> None:
    hub, built, assets = folder / "hub", folder / "built", folder / "assets" / "vllm_public_assets"
    for name, family in FAMILIES.items():
        publish(build_family_model(family, built / family), hub, name)
    text = build_text_model(built / "text")
    for name in TEXT:
        publish(text, hub, name)
    assets.mkdir(parents=True)
    with Image.open(photo_path("coffee")) as photo:
        for name, mode in PICTURES.items():
            photo.convert(mode).save(assets / name)
    film(folder / "assets" / "video-example-data" / VIDEO)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
