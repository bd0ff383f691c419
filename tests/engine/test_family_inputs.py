"""What each family's processor makes of photos, videos and conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from promprune_vllm.demo import glm_processing as glm
from promprune_vllm.demo import internvl_processing as internvl
from promprune_vllm.demo import qwen_processing as qwen
from promprune_vllm.demo.processing import IMAGE_ID
from tests.engine.family_prompts import GLM, INTERNVL, PHOTO, QWEN, TALK, TEXT, VIDEO, photo, processor_of, prompt

each_qwen = pytest.mark.parametrize("family", QWEN)
each_internvl = pytest.mark.parametrize("family", INTERNVL)
each_glm = pytest.mark.parametrize("family", GLM)
FRAMES = np.zeros((4, 3, 64, 96), dtype=np.uint8)


def watched(processor: Any) -> Any:
    """A prompt with a short video."""
    text = prompt(processor, VIDEO, TEXT)
    return processor(videos=[FRAMES], text=text, return_tensors="pt", do_sample_frames=False)


# Coffee is 600 x 400 pixels, rocket is taller than wide. LLaVA-NeXT: the whole image (64), and the crops without
# padding with one newline per row of theirs; LLaVA-OneVision shrinks crops of more than nine tiles. InternVL:
# 3 x 2 or 2 x 3 tiles, and the whole image.
@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("llava", "coffee", 144),
        ("llava", "rocket", 144),
        ("llava_next", "coffee", 64 + 10 * (16 + 1)),
        ("llava_onevision", "coffee", 25 + 13 * (20 + 1)),
        ("llava_onevision", "astronaut", 25 + 15 * (15 + 1)),
        ("qwen2_vl", "coffee", 13 * 19),
        ("qwen2_5_vl", "coffee", 13 * 19),
        ("qwen3_vl", "coffee", 12 * 19),
        ("internvl", "coffee", 7 * 16),
        ("internvl", "rocket", 7 * 16),
        ("glm4v", "coffee", 13 * 19),
        ("glm4v", "rocket", 15 * 11),
        ("glm4v_moe", "coffee", 13 * 19),
        ("glm_ocr", "coffee", 13 * 19),
    ],
)
def test_a_photo_becomes_this_many_image_tokens(
    models: dict[str, Path], family: str, name: str, expected: int
) -> None:
    processor = processor_of(models[family])
    inputs = processor(images=photo(name), text=prompt(processor, PHOTO, TEXT), return_tensors="pt")
    assert int((inputs["input_ids"] == IMAGE_ID).sum()) == expected
    if family in (*QWEN, *GLM):
        assert int(inputs["image_grid_thw"].prod()) == 4 * expected


@pytest.mark.parametrize(
    ("size", "tiles"),
    [((100, 100), 1), ((300, 300), 4), ((500, 100), 5), ((100, 500), 5), ((400, 200), 2), ((1200, 800), 6)],
)
def test_the_shape_of_an_image_decides_its_internvl_tiles(
    models: dict[str, Path], size: tuple[int, int], tiles: int
) -> None:
    processor = processor_of(models["internvl"])
    image = photo("coffee").resize(size)
    inputs = processor(images=image, text=prompt(processor, PHOTO), return_tensors="pt")
    with_whole = tiles + (tiles > 1)
    assert inputs["pixel_values"].shape == (with_whole, 3, 112, 112)
    shown = inputs["input_ids"][0].tolist()
    first = shown.index(internvl.IMAGE_START_ID) + 1
    last = shown.index(internvl.IMAGE_END_ID)
    assert shown[first:last] == [IMAGE_ID] * (16 * with_whole)


@pytest.mark.parametrize(("size", "tokens"), [((20, 20), 2 * 2), ((100, 60), 4 * 2), ((3000, 2000), 13 * 19)])
def test_glm_has_few_tokens_for_a_small_image_and_at_most_256(
    models: dict[str, Path], size: tuple[int, int], tokens: int
) -> None:
    processor = processor_of(models["glm4v"])
    inputs = processor(images=photo("coffee").resize(size), text=prompt(processor, PHOTO), return_tensors="pt")
    assert int((inputs["input_ids"] == IMAGE_ID).sum()) == tokens <= 256


@each_qwen
def test_a_video_becomes_what_its_grid_says(models: dict[str, Path], family: str) -> None:
    inputs = watched(processor_of(models[family]))
    assert inputs["video_grid_thw"][0, 0] == 2  # two frames are one step in time
    assert int((inputs["input_ids"] == qwen.VIDEO_ID).sum()) == int(inputs["video_grid_thw"].prod()) // 4


@each_glm
def test_a_glm_video_is_images_with_their_times(models: dict[str, Path], family: str) -> None:
    processor = processor_of(models[family])
    inputs = watched(processor)
    steps, rows, columns = inputs["video_grid_thw"][0].tolist()
    assert steps == 2
    image = f"<|begin_of_image|>{'<|image|>' * (rows * columns // 4)}<|end_of_image|>"
    times = ("0.0 seconds", "0.1 seconds") if family == "glm_ocr" else ("0", "0")
    frames = "".join(image + time for time in times)
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == (
        f"[gMASK]<sop><|user|>\n<|begin_of_video|>{frames}<|end_of_video|>What?<|assistant|>\n"
    )


@pytest.mark.parametrize(
    ("family", "tokens"), [("llava_onevision", 4 * 3 * 3 + 1), ("llava_next_video", 4 * 4 * 4)]
)
def test_a_llava_video_is_one_run_of_tokens(models: dict[str, Path], family: str, tokens: int) -> None:
    processor = processor_of(models[family])
    inputs = watched(processor)
    assert inputs["pixel_values_videos"].shape[:3] == (1, 4, 3)
    assert f"{'<video>' * tokens}\nWhat?" in processor.tokenizer.decode(inputs["input_ids"][0])


def test_an_internvl_video_is_a_tile_per_frame(models: dict[str, Path]) -> None:
    processor = processor_of(models["internvl"])
    inputs = watched(processor)
    assert inputs["pixel_values"].shape == (4, 3, 112, 112)
    frames = "\n".join(f"Frame{i}: <img>{'<IMG_CONTEXT>' * 16}</img>" for i in range(1, 5))
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == (
        f"<|im_start|>user\n{frames}\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )


@each_qwen
def test_the_qwen_template_renders_parts_in_their_order(models: dict[str, Path], family: str) -> None:
    see, watch = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    processor = processor_of(models[family])
    assert prompt(processor, TEXT, PHOTO, VIDEO, TEXT) == (
        f"<|im_start|>user\nWhat?{see}{watch}What?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = processor.tokenizer.encode(see + "é")
    assert ids == [qwen.VISION_START_ID, IMAGE_ID, qwen.VISION_END_ID, 4 + 0xC3, 4 + 0xA9]
    assert processor.apply_chat_template(TALK) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n"
    )


@each_internvl
def test_the_internvl_template_renders_parts_in_their_order(models: dict[str, Path], family: str) -> None:
    processor = processor_of(models[family])
    see = "<IMG_CONTEXT>" if family == "internvl" else "<image>"
    assert prompt(processor, TEXT, PHOTO, VIDEO, TEXT) == (
        f"<|im_start|>user\nWhat?{see}\n<video>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template(TALK, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n"
    )


@each_internvl
def test_an_image_in_an_internvl_prompt_is_between_special_tokens(models: dict[str, Path], family: str) -> None:
    tokenizer = getattr(processor_of(models[family]), "tokenizer", processor_of(models[family]))
    around = [internvl.IMAGE_START_ID, IMAGE_ID, internvl.IMAGE_END_ID]
    assert tokenizer.encode("<img><IMG_CONTEXT></img>") == around
    assert set(around) <= set(tokenizer.all_special_ids)
    # vLLM finds these in the text: only transformers' processor has a token for a video.
    assert len(tokenizer.encode("<image>")) == len("<image>")
    assert len(tokenizer.encode("<video>")) == (1 if family == "internvl" else len("<video>"))
    assert tokenizer.encode("<video>" if family == "internvl" else "<|video_pad|>") == [internvl.VIDEO_ID]


@each_glm
def test_the_glm_template_renders_parts_in_their_order(models: dict[str, Path], family: str) -> None:
    see, watch = (f"<|begin_of_{kind}|><|{kind}|><|end_of_{kind}|>" for kind in ("image", "video"))
    processor = processor_of(models[family])
    assert prompt(processor, TEXT, PHOTO, VIDEO, TEXT) == (
        f"[gMASK]<sop><|user|>\nWhat?{see}{watch}What?<|assistant|>\n"
    )
    ids = processor.tokenizer.encode(see + watch)
    image, video = [glm.IMAGE_START_ID, IMAGE_ID, glm.IMAGE_END_ID], [glm.VIDEO_START_ID, glm.VIDEO_ID]
    assert ids == [*image, *video, glm.VIDEO_END_ID]
    assert processor.apply_chat_template(TALK) == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHello<|assistant|>\nHi"
    )


def test_the_onevision_template_renders_parts_in_their_order(models: dict[str, Path]) -> None:
    assert prompt(processor_of(models["llava_onevision"]), TEXT, PHOTO, VIDEO, TEXT) == (
        "<|im_start|>user\nWhat?<image>\n<video>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
def test_the_llava_template_puts_images_first(models: dict[str, Path], family: str) -> None:
    assert prompt(processor_of(models[family]), TEXT, PHOTO) == "<s>USER: <image>\nWhat? ASSISTANT:"
    spoken = processor_of(models[family]).apply_chat_template([{"role": "user", "content": "Hello"}])
    assert spoken == "<s>USER: Hello "
