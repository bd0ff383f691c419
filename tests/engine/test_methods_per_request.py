"""Methods that a request chooses, and the user's text for those that look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from promprune_vllm import Need, methods
from promprune_vllm.engine.worker.selected_tokens import select_tokens
from tests.engine.family_engine import FAMILY_ENGINES, FamilyEngine, shared_engine
from tests.engine.test_families import image_rows

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
ALLOWED = tuple(methods(over_frames=False))
READERS = tuple(name for name, method in methods().items() if Need.TEXT in method.needs)
QUESTIONS = ("How many cups are there on the table?", "zzzz 99999 !!!")


@pytest.fixture(params=["llava_next", "qwen3_vl"])
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> FamilyEngine:
    return shared_engine(request.param, models[request.param])


def ask(engine: FamilyEngine, method: str, text: str | None = None, budget: int = 25) -> dict[str, Any]:
    prompt = engine.ask("landscape", budget=budget)
    prompt["mm_processor_kwargs"]["visual_token_method"] = method
    if text is not None:
        prompt["mm_processor_kwargs"]["visual_token_text"] = text
    return prompt


@torch.inference_mode()
def wanted(engine: FamilyEngine, method: str, text: str, budget: int = 25) -> torch.Tensor:
    """Rows of a method that was told the text by hand."""
    ids = torch.tensor(engine.llm.get_tokenizer().encode(text, add_special_tokens=False))
    image = engine.encoded("landscape").with_text(engine.model.get_language_model().embed_input_ids(ids))
    selector = next(each for each in engine.model._methods if each.name == method)
    rows, _ = select_tokens(image, budget, selector).rows(engine.model.project)
    return rows[:, : engine.llm.model_config.get_hidden_size()]


def entered(engine: FamilyEngine, prompt: dict[str, Any]) -> torch.Tensor:
    engine.forget()
    with engine.fed() as fed:
        (output,) = engine.generate([prompt], tokens=1)
    return image_rows(output, torch.cat(fed.embeds))


@pytest.mark.parametrize("method", ALLOWED)
def test_the_chosen_method_selects_with_the_users_text(engine: FamilyEngine, method: str) -> None:
    assert torch.equal(entered(engine, ask(engine, method, QUESTIONS[0])), wanted(engine, method, QUESTIONS[0]))


def test_methods_of_one_batch_do_not_mix(engine: FamilyEngine) -> None:
    asks = [ask(engine, method, QUESTIONS[0]) for method in ALLOWED]
    engine.forget()
    alone = [engine.generate([each])[0].outputs[0].token_ids for each in asks]
    engine.forget()
    together = [output.outputs[0].token_ids for output in engine.generate(asks)]
    assert together == alone


@pytest.mark.parametrize("method", ALLOWED)
def test_two_questions_share_an_image_only_where_the_text_is_not_looked_at(
    engine: FamilyEngine, method: str
) -> None:
    engine.forget()
    with engine.fed() as fed:
        for text in (*QUESTIONS, *QUESTIONS):
            engine.generate([ask(engine, method, text)], tokens=1)
    assert fed.tower_calls == (2 if method in READERS else 1)


def test_without_a_told_text_the_prompt_itself_is_looked_at(engine: FamilyEngine) -> None:
    """Of an offline prompt, everything but markers."""
    assert READERS
    prompt = ask(engine, READERS[0])
    assert torch.equal(entered(engine, prompt), wanted(engine, READERS[0], "0. What?"))


def test_the_last_turn_of_a_chat_is_the_users_text() -> None:
    from types import SimpleNamespace

    from promprune_vllm.engine.api_server.request_fields import from_request

    def said(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    image = {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}
    turns = [
        {"role": "user", "content": [image, {"type": "text", "text": "first"}]},
        {"role": "assistant", "content": "answer"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "second"}, image, {"type": "text", "text": "third"}],
        },
        {"role": "assistant", "content": "so"},
    ]
    asked = from_request(SimpleNamespace(), turns, honor_detail=True)
    assert asked.text == "second\nthird"
    assert asked.details == ("low", "low")
    plain = from_request(SimpleNamespace(), [{"role": "user", "content": "words"}], honor_detail=True)
    assert (plain.text, plain.details) == ("words", None)
    assert from_request(SimpleNamespace(), ["a completion"], honor_detail=True).text is None
