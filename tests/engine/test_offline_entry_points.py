"""Every offline entry point obeys a budget, in the way that the table of routes says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.demo import photo_path
from promprune_vllm.demo.model import DemoModelSpec, build_demo_model
from promprune_vllm.errors import SettingsError
from promprune_vllm.server.route_table import OFFLINE

pytestmark = pytest.mark.engine
FULL, DEFAULT, ASKED = 16, 4, 5
"""Tokens of the small model's image: all, those of a default of 25%, and those that tests ask for."""
BUDGET = "visual_token_budget"
SPEC = DemoModelSpec(image_px=56, hidden=64, heads=2, mlp=128, layers=2)
OPTIONS = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "block_size": 32, "seed": 0}
NO_PROMPTS = {
    *("apply_model", "collective_rpc", "from_engine_args", "wait_for_completion", "sleep", "wake_up"),
    *("start_profile", "stop_profile", "reset_mm_cache", "reset_prefix_cache", "release_kv_cache_memory"),
}
"""Methods of ``LLM`` that take none."""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_model(tmp_path_factory.mktemp("small") / "model", SPEC)


def _engine(model: Path, **options: Any) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    return LLM(str(model), **{**OPTIONS, **options})


# One at a time: vLLM's process groups belong to the process.
@pytest.fixture(scope="class")
def llm(request: pytest.FixtureRequest, small_model: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPRUNE_BUDGET", "25%")
        made = _engine(small_model, runner=request.cls.runner)
        yield made
        made.llm_engine.engine_core.shutdown()


def _photo() -> Image.Image:
    return Image.open(photo_path("coffee")).convert("RGB")


def _prompt(**more: Any) -> dict[str, Any]:
    return {"prompt": "USER: <image>\nWhat? ASSISTANT:", "multi_modal_data": {"image": _photo()}, **more}


def _messages() -> list[dict[str, Any]]:
    content = [{"type": "image_pil", "image_pil": _photo()}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": content}]


def _kwargs(value: Any) -> dict[str, Any]:
    return {} if value is None else {"mm_processor_kwargs": {BUDGET: value}}


def _lengths(outputs: list[Any]) -> list[int]:
    return [len(output.prompt_token_ids) for output in outputs]


def _drop(length_of: Callable[[Any], int]) -> None:
    """What is kept shows in the length of the prompt."""
    from vllm.exceptions import VLLMValidationError

    full = length_of("full")
    assert full - length_of(ASKED) == FULL - ASKED
    assert full - length_of(None) == FULL - DEFAULT
    with pytest.raises(VLLMValidationError, match=BUDGET):
        length_of(-3)


def test_the_table_knows_every_method_that_takes_prompts() -> None:
    import inspect

    from vllm import LLM

    taking = set()
    for name, method in inspect.getmembers(LLM, callable):
        if not name.startswith("_") and name not in NO_PROMPTS:
            parameters = inspect.signature(method).parameters.keys()
            if parameters & {"prompts", "messages", "data_1"}:
                taking.add(f"LLM.{name}")
    assert taking <= OFFLINE.keys()


class TestGenerating:
    runner = "generate"

    def test_generate_and_chat(self, llm: Any) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1)
        _drop(lambda value: _lengths(llm.generate(_prompt(**_kwargs(value)), sampling, use_tqdm=False))[0])
        _drop(lambda value: _lengths(llm.generate(_prompt(), sampling, use_tqdm=False, **_kwargs(value)))[0])
        _drop(lambda value: _lengths(llm.chat(_messages(), sampling, use_tqdm=False, **_kwargs(value)))[0])

    def test_enqueued_prompts(self, llm: Any) -> None:
        from vllm import SamplingParams

        def length_of(value: Any) -> int:
            llm.enqueue(_prompt(**_kwargs(value)), SamplingParams(max_tokens=1), use_tqdm=False)
            return _lengths(llm.wait_for_completion(use_tqdm=False))[0]

        def chat_length_of(value: Any) -> int:
            llm.enqueue_chat(_messages(), SamplingParams(max_tokens=1), use_tqdm=False, **_kwargs(value))
            return _lengths(llm.wait_for_completion(use_tqdm=False))[0]

        _drop(length_of)
        _drop(chat_length_of)

    def test_beam_search(self, llm: Any) -> None:
        from vllm.sampling_params import BeamSearchParams

        beams = BeamSearchParams(beam_width=2, max_tokens=1)
        _drop(lambda value: len(llm.beam_search([_prompt(**_kwargs(value))], beams)[0].sequences[0].tokens))

    def test_no_answer_is_asked_for_again(self, llm: Any) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        def ask(value: Any) -> Any:
            options = {"mm_processor_kwargs": {BUDGET: ASKED, ESCALATE_FIELD: value}}
            return llm.generate(_prompt(**options), SamplingParams(max_tokens=1), use_tqdm=False)

        with pytest.raises(VLLMValidationError, match=r"vllm\.LLM answers once, only servers answer again"):
            ask(0.9)
        assert ask(False)


class TestPooling:
    runner = "pooling"

    def test_embed_and_encode(self, llm: Any) -> None:
        _drop(lambda value: _lengths(llm.embed(_prompt(**_kwargs(value)), use_tqdm=False))[0])
        _drop(
            lambda value: _lengths(llm.encode(_prompt(**_kwargs(value)), use_tqdm=False, pooling_task="embed"))[0]
        )

    def test_score_has_the_default_only(self, llm: Any) -> None:
        document = {"content": [{"type": "image_pil", "image_pil": _photo()}]}
        text = len("What?") + 1
        assert _lengths(llm.score("What?", document, use_tqdm=False)) == [text + DEFAULT]


@pytest.mark.parametrize("name", [BUDGET, "visual_token_method", "visual_token_text"])
def test_a_field_among_the_engines_processor_options_is_refused_at_start_up(small_model: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name} in the engine's mm_processor_kwargs .* PROMPRUNE_BUDGET"):
        _engine(small_model, mm_processor_kwargs={name: 64})


@pytest.mark.parametrize("options", [{"max_logprobs": 0}, {"logprobs_mode": "raw_logits"}])
def test_escalation_without_logprobs_is_refused_at_start_up(
    small_model: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPRUNE_ESCALATE", "0.9")
    with pytest.raises(SettingsError, match=r"PROMPRUNE_ESCALATE.* confidence is read from log-probabilities"):
        _engine(small_model, **options)
