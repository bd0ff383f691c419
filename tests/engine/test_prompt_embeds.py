"""Text that comes as embeddings (``--enable-prompt-embeds``), beside pruned images in a batch and in a prompt."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from promprune_vllm.engine.keys import REPROCESS
from tests.engine.family_engine import Fed
from tests.engine.small_steps import (
    FAMILIES,
    NOTHING,
    SMALL_STEPS,
    Answer,
    SmallSteps,
    distinct,
    picture_of_its_own,
    shared_engine,
)

pytestmark = pytest.mark.engine
TOGETHER = SMALL_STEPS
TEXTS = ("Look at what is shown in these two: ", "Which of them is better? ")
BUDGETS = (None, 20, [20, "full"], ["full", 20])
Part = dict[str, Any]


@pytest.fixture(params=FAMILIES)  # vLLM's Qwen3-VL cannot: see docs/upstream.md
def engine(request: pytest.FixtureRequest, demo_model: Path, models: dict[str, Path]) -> SmallSteps:
    return shared_engine(request.param, demo_model, models)


def _tokens(engine: SmallSteps, text: str) -> list[int]:
    return list(engine.llm.get_tokenizer().encode(text, add_special_tokens=False))


@torch.inference_mode()
def _embedded(engine: SmallSteps, text: str) -> torch.Tensor:
    """The rows that the model itself has for a text."""
    return engine.model.get_language_model().embed_input_ids(torch.tensor(_tokens(engine, text))).clone()


def _embeds(engine: SmallSteps, text: str) -> Part:
    file = io.BytesIO()
    torch.save(_embedded(engine, text), file)
    return {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}


def _text(_: SmallSteps, text: str) -> Part:
    return {"type": "text", "text": text}


def _messages(engine: SmallSteps, part: Any) -> list[dict[str, Any]]:
    """Two images, and text before and between them that is sent as ``part`` says."""
    images = [{"type": "image_pil", "image_pil": picture_of_its_own(i)} for i in range(2)]
    content = [part(engine, TEXTS[0]), images[0], part(engine, TEXTS[1]), images[1], _text(engine, "Say it.")]
    return [{"role": "user", "content": content}]


def _chat(engine: SmallSteps, part: Any, budget: object) -> tuple[Answer, Fed]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    options = None if budget is None else {"visual_token_budget": budget}
    with engine.fed() as fed:
        (output,) = engine.llm.chat(_messages(engine, part), sampling, use_tqdm=False, mm_processor_kwargs=options)
    return Answer.of(output), fed


def test_prompts_of_embeddings_alone_beside_pruned_images_answer_as_text(engine: SmallSteps) -> None:
    tokens = [{"prompt_token_ids": _tokens(engine, text * 3)} for text in TEXTS]
    embeds = [{"prompt_embeds": _embedded(engine, text * 3)} for text in TEXTS]
    images = [engine.show(picture_of_its_own(i), budget=50 - i, text=f"{i}?") for i in range(3)]
    expected = [engine.alone(prompt) for prompt in (*tokens, *images)]
    assert distinct(expected)
    engine.forget()
    assert engine.ask_all([images[0], embeds[0], *images[1:], embeds[1]]) == [
        *(expected[2], expected[0], *expected[3:], expected[1])
    ]
    assert engine.left() == NOTHING


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_prompt_of_embeddings_and_pruned_images_answers_as_text(engine: SmallSteps, budget: object) -> None:
    """In one chunk with the images, too: embeddings take up no position of any image's grid."""
    engine.forget()
    expected, text = _chat(engine, _text, budget)
    engine.forget()
    answer, embeds = _chat(engine, _embeds, budget)
    assert answer == expected
    assert len(text.embeds) > 6, "in chunks"
    assert torch.equal(torch.cat(embeds.embeds), torch.cat(text.embeds))
    assert torch.equal(torch.cat(embeds.positions, dim=-1), torch.cat(text.positions, dim=-1))
    again, hot = _chat(engine, _embeds, budget)
    assert again == expected
    assert again.cached > 0
    assert torch.equal(torch.cat(hot.positions, dim=-1), torch.cat(text.positions, dim=-1)[..., again.cached :])
    assert engine.left() == NOTHING


@pytest.mark.parametrize("budget", [None, 20])
def test_embeddings_are_not_lost_when_a_prompt_is_processed_again(engine: SmallSteps, budget: int | None) -> None:
    """As it is where the engine lacks an image that the server takes it to have."""
    from vllm.renderers.params import ChatParams

    renderer = engine.llm.llm_engine.renderer
    template = {"tokenize": True, "return_dict": False}
    options = {} if budget is None else {"mm_processor_kwargs": {"visual_token_budget": budget}}

    async def process() -> dict[str, Any]:
        messages = _messages(engine, _embeds)
        _, prompt = await renderer.render_messages_async(messages, ChatParams(chat_template_kwargs=template))
        processed: dict[str, Any] = await renderer._process_singleton_async({**prompt, **options})
        return processed

    async def three_times() -> tuple[dict[str, Any], dict[str, Any]]:
        first, second = await process(), await process()
        return first, await second[REPROCESS]()

    engine.forget()
    first, again = asyncio.run(three_times())
    for name in ("prompt_token_ids", "mm_placeholders", "mm_hashes"):
        assert again[name] == first[name]
    assert [len(items) for items in again["mm_kwargs"].values()] == [2, 2]
    assert all(item is not None for items in again["mm_kwargs"].values() for item in items)
