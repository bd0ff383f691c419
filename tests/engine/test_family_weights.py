"""vLLM reads the tiny checkpoints as transformers does, and both layouts of InternVL as the same model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from promprune_vllm.demo.families import has_remote_code
from promprune_vllm.demo.processing import IMAGE_ID, VOCAB_SIZE
from tests.engine.conftest import SHARED, Engine
from tests.engine.family_prompts import GLM, INTERNVL, PHOTO, TEXT, photo, processor_of, prompt

# Names of a layer of InternVLChat's tower, and of transformers'.
LAYER = {
    "attn.proj.weight": "attention.projection_layer.weight",
    "attn.proj.bias": "attention.projection_layer.bias",
    "norm1.weight": "layernorm_before.weight",
    "norm1.bias": "layernorm_before.bias",
    "norm2.weight": "layernorm_after.weight",
    "norm2.bias": "layernorm_after.bias",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
AROUND = {
    "vision_model.embeddings.class_embedding": "vision_tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding.weight": "vision_tower.embeddings.patch_embeddings.projection.weight",
    "vision_model.embeddings.patch_embedding.bias": "vision_tower.embeddings.patch_embeddings.projection.bias",
    "mlp1.0.weight": "multi_modal_projector.layer_norm.weight",
    "mlp1.0.bias": "multi_modal_projector.layer_norm.bias",
    "mlp1.1.weight": "multi_modal_projector.linear_1.weight",
    "mlp1.1.bias": "multi_modal_projector.linear_1.bias",
    "mlp1.3.weight": "multi_modal_projector.linear_2.weight",
    "mlp1.3.bias": "multi_modal_projector.linear_2.bias",
}


@pytest.fixture(params=("llava_onevision", *INTERNVL, *GLM))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def served(family: str, models: dict[str, Path]) -> Engine:
    options = {"max_model_len": 1536, "num_gpu_blocks_override": 64, "max_logprobs": VOCAB_SIZE}
    remote = has_remote_code(family)
    return SHARED.get(f"weights of {family}", lambda: Engine(models[family], trust_remote_code=remote, **options))


@pytest.mark.release
def test_vllm_computes_what_transformers_does(family: str, served: Engine, models: dict[str, Path]) -> None:
    from transformers import AutoModelForImageTextToText
    from vllm import SamplingParams

    twin = "internvl" if family == "internvl_chat" else family  # transformers has no InternVLChat
    reference = AutoModelForImageTextToText.from_pretrained(models[twin], attn_implementation="eager")
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=VOCAB_SIZE)
    for photos in ([photo("coffee")], [photo("coffee"), photo("rocket")]):
        parts = [PHOTO] * len(photos) + [TEXT]
        question = {
            "prompt": prompt(processor_of(models[family]), *parts),
            "multi_modal_data": {"image": photos},
        }
        (done,) = served.llm.generate([question], sampling, use_tqdm=False)
        inputs = _inputs(models[twin], parts, photos)
        assert done.prompt_token_ids == inputs["input_ids"][0].tolist()  # so both count the same image tokens
        assert done.prompt_token_ids.count(IMAGE_ID) > 100 * len(photos)
        if twin != family:  # vLLM resizes them by another library
            inputs["pixel_values"] = _tiles(served, photos)
        with torch.inference_mode():
            expected = reference(**inputs).logits[0, -1].log_softmax(-1)
            answer = reference.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        found = torch.tensor([done.outputs[0].logprobs[0][i].logprob for i in range(VOCAB_SIZE)])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        assert done.outputs[0].token_ids == answer[0, inputs["input_ids"].shape[1] :].tolist()


def _inputs(directory: Path, parts: list[dict[str, str]], photos: list[Image.Image]) -> Any:
    processor = processor_of(directory)
    return processor(images=photos, text=prompt(processor, *parts), return_tensors="pt")


def _tiles(engine: Engine, photos: list[Image.Image]) -> torch.Tensor:
    """``(tiles, 3, 112, 112)``: the tower's input, as vLLM prepares it."""
    processor = engine.llm.llm_engine.input_processor.renderer.mm_processor.info.get_hf_processor()
    tiles: torch.Tensor = processor.image_processor(photos, return_tensors="pt")["pixel_values_flat"]
    return tiles


def test_both_layouts_of_internvl_have_the_same_weights(models: dict[str, Path]) -> None:
    ours, original = (load_file(models[family] / "model.safetensors") for family in INTERNVL)
    same = dict(AROUND) | {name: name for name in ours if name.startswith("language_model.")}
    fused = {}
    for i in range(4):
        theirs, layer = f"vision_model.encoder.layers.{i}", f"vision_tower.encoder.layer.{i}"
        same |= {f"{theirs}.{name}": f"{layer}.{twin}" for name, twin in LAYER.items()}
        for kind in ("weight", "bias"):
            parts = [ours.pop(f"{layer}.attention.{part}_proj.{kind}") for part in "qkv"]
            fused[f"{theirs}.attn.qkv.{kind}"] = torch.cat(parts)
    assert original.keys() == same.keys() | fused.keys()
    assert ours.keys() == set(same.values())
    assert all(torch.equal(original[name], ours[twin]) for name, twin in same.items())
    assert all(torch.equal(original[name], weight) for name, weight in fused.items())


def test_the_original_layout_is_configured_by_code_that_must_be_trusted(models: dict[str, Path]) -> None:
    from transformers import AutoConfig

    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(models["internvl_chat"], trust_remote_code=False)
    read = AutoConfig.from_pretrained(models["internvl_chat"], trust_remote_code=True)
    assert re.fullmatch(r"transformers_modules\..*\.configuration_internvl_chat", type(read).__module__)
    assert (read.vision_config.num_attention_heads, read.llm_config.model_type) == (2, "qwen2")
    assert (read.use_thumbnail, read.ps_version, read.max_dynamic_patch) == (True, "v2", 6)
