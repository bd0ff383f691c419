"""The committed weights: they answer, transformers and vLLM agree on what, and fewer tokens cost answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from promprune_vllm.demo.scenes import KINDS, TASKS, Question, Scene, make_scene, pair_question
from promprune_vllm.demo.trained import CARD, SCORES, TRAINED
from tests.engine.conftest import Engine

SLICE = 1500  # the scenes asked about here follow those that the card's scores are from
MAX_BYTES = 7_000_000


@pytest.fixture(scope="module")
def model() -> Any:
    from deploy.training.scoring import load

    return load(TRAINED)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    running = Engine(TRAINED, limit_mm_per_prompt={"image": 2})
    yield running
    running.close()


def asked(scenes: int) -> list[tuple[Scene, Question]]:
    """Two questions about each of so many scenes."""
    chosen = [make_scene(kind, SLICE + seed) for seed in range(scenes // 2) for kind in KINDS]
    return [(scene, question) for scene in chosen for question in scene.questions()[:2]]


def prompts(processor: Any, asks: list[tuple[Scene, Question]]) -> list[dict[str, Any]]:
    texts = []
    for scene, question in asks:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        texts.append({"prompt": text, "multi_modal_data": {"image": scene.image()}})
    return texts


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(TRAINED)


def test_the_files_are_small_and_the_card_tells_the_scores() -> None:
    assert (TRAINED / "model.safetensors").stat().st_size <= MAX_BYTES
    card = CARD.read_text()
    scores = json.loads(SCORES.read_text())
    assert set(TASKS) <= set(scores["full"])
    for task in TASKS:
        assert f"| {task} | {scores['full'][task]:.1f} |" in card
    assert "subset" in card


def test_a_slice_of_held_out_scenes_is_answered_as_the_card_says(model: Any) -> None:
    from deploy.training.scoring import MACRO, SALIENCY, held_out_scenes, score

    told = json.loads(SCORES.read_text())
    scenes = held_out_scenes(40, 30, first_seed=SLICE)
    full, random = score(model, scenes), score(model, scenes, keep=64)
    assert full[MACRO] > told["full"][MACRO] - 6
    assert full[SALIENCY] > told["full"][SALIENCY] - 0.03
    assert random[MACRO] < full[MACRO] - 5
    for task in ("presence", "colour", "digit"):
        assert full[task] > told["full"][task] - 12


@torch.inference_mode()
@pytest.mark.release
def test_vllm_answers_as_transformers_does(engine: Engine, model: Any, processor: Any) -> None:
    asks = asked(100)
    answers = engine.llm.generate(prompts(processor, asks), _greedy(), use_tqdm=False)
    same = 0
    for (scene, _), prompt, answer in zip(asks, prompts(processor, asks), answers, strict=True):
        inputs = processor(text=[prompt["prompt"]], images=[scene.image()], return_tensors="pt")
        assert answer.prompt_token_ids == inputs["input_ids"][0].tolist()
        best = int(model(**inputs).logits[0, -1].argmax())
        same += answer.outputs[0].token_ids[0] == best
    assert len(asks) == 200
    assert same >= 0.98 * len(asks)


def test_answers_are_words_and_end(engine: Engine, processor: Any) -> None:
    asks = asked(30)
    answers = engine.llm.generate(prompts(processor, asks), _greedy(), use_tqdm=False)
    texts = [answer.outputs[0].text.strip() for answer in answers]
    right = [text == question.answer for text, (_, question) in zip(texts, asks, strict=True)]
    assert sum(right) > 0.7 * len(right)
    ended = [answer.outputs[0].finish_reason == "stop" for answer in answers]
    assert sum(ended) > 0.95 * len(ended)


def test_two_images_are_told_apart(engine: Engine, processor: Any) -> None:
    requests, truth = [], []
    for seed in range(24):
        scenes = [make_scene("scattered", SLICE + 2 * seed + i) for i in range(2)]
        question = pair_question(*scenes)
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        requests.append({"prompt": text, "multi_modal_data": {"image": [scene.image() for scene in scenes]}})
        truth.append(question.answer)
    answers = engine.llm.generate(requests, _greedy(), use_tqdm=False)
    right = [a.outputs[0].text.strip() == t for a, t in zip(answers, truth, strict=True)]
    assert sum(right) > 0.7 * len(right)


def _greedy() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=4)
