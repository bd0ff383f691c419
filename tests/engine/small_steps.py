"""Engines that take a prompt in many small steps, each planned before the result of the one before is read."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tests.engine.conftest import SHARED, held_rows
from tests.engine.family_engine import FamilyEngine, picture

STEP = 64
"""Tokens of a step. The encoder cache is then as small as vLLM makes it: it has room for the largest image."""
LARGEST = 128
"""Tokens of the largest image, where images have as many as they like."""
PIXELS = {"qwen2_5_vl": 28 * 28, "qwen3_vl": 32 * 32}
"""Pixels of a token, of the families whose images have."""
SMALL_STEPS = "engines with small steps"
FAMILIES = ("llava", "qwen2_5_vl")
ROUNDING = 1e-5
SPARE = "<unused_319>"
"""A token of the tiny checkpoints that no text has."""
_names = (f"r{i}" for i in itertools.count())


def picture_of_its_own(number: int) -> Image.Image:
    """A picture like no other; all of them have as many tokens."""
    return picture("landscape").rotate(7 * number)


@dataclass(frozen=True)
class Answer:
    """Token ids, and how likely the model found each: tiny models say the same about many pictures."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str
    cached: int = field(default=0, compare=False)

    @classmethod
    def of(cls, output: Any) -> Answer:
        """Return what vLLM's output says; it has to have logprobs."""
        (answer,) = output.outputs
        chosen = zip(answer.token_ids, answer.logprobs, strict=True)
        values = tuple(step[token].logprob for token, step in chosen)
        return cls(tuple(answer.token_ids), values, str(answer.finish_reason), output.num_cached_tokens)

    def __eq__(self, other: object) -> bool:
        """The same ids, and logprobs but for rounding: matrix products of another height round otherwise."""
        assert isinstance(other, Answer)
        near = all(abs(a - b) < ROUNDING for a, b in zip(self.logprobs, other.logprobs, strict=False))
        return (self.ids, self.reason) == (other.ids, other.reason) and near

    __hash__ = None


class SmallSteps(FamilyEngine):
    """Requests can be started, stepped and aborted one by one."""

    def __init__(self, family: str, model: Path) -> None:
        options: dict[str, Any] = {"max_num_batched_tokens": STEP, "enable_prompt_embeds": True}
        if family in PIXELS:
            options["mm_processor_kwargs"] = {"max_pixels": LARGEST * PIXELS[family]}
            options["limit_mm_per_prompt"] = {"video": 0}  # they have more tokens than any image
        self._folder = tempfile.TemporaryDirectory()
        copied = shutil.copytree(model, Path(self._folder.name) / family)
        name_spare_token(copied)
        try:
            super().__init__(family, copied, **options)
        except BaseException:  # a family that this minor cannot load is skipped
            self._folder.cleanup()
            raise

    def close(self) -> None:
        super().close()
        self._folder.cleanup()

    @property
    def rows_of_cache(self) -> int:
        """Rows that the encoder cache has room for."""
        return int(self.core.scheduler.encoder_cache_manager.cache_size)

    def show(
        self, *images: Image.Image, budget: object = None, before: str = "", text: str = "What?"
    ) -> dict[str, Any]:
        """A prompt with these images."""
        prompt = self.ask(*["landscape"] * len(images), before=before, text=text)
        prompt["multi_modal_data"] = {"image": list(images)}
        if budget is not None:
            prompt["mm_processor_kwargs"] = {"visual_token_budget": budget}
        return prompt

    def alone(self, prompt: dict[str, Any]) -> Answer:
        """The answer to a prompt that is asked alone and with every cache empty."""
        self.forget()
        (answer,) = self.ask_all([prompt])
        return answer

    def ask_all(self, prompts: Sequence[dict[str, Any]]) -> list[Answer]:
        """The answers to prompts that are asked at once."""
        names = [self.start(prompt) for prompt in prompts]
        answers = self.finish()
        return [answers[name] for name in names]

    def start(self, prompt: dict[str, Any], tokens: int = 6) -> str:
        """Add a request, and return its name."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        name = next(_names)
        self.llm.llm_engine.add_request(name, prompt, sampling)
        return name

    def rendered(self, prompt: dict[str, Any]) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a prompt, and where its images begin and end."""
        (rendered,) = self.llm.llm_engine.renderer.render_cmpl([prompt])
        places = rendered["mm_placeholders"]["image"]
        return list(rendered["prompt_token_ids"]), [(each.offset, each.offset + each.length) for each in places]

    def step(self) -> dict[str, Answer]:
        """Take a step, and return the answers that ended."""
        ended = [output for output in self.llm.llm_engine.step() if output.finished]
        return {output.request_id: Answer.of(output) for output in ended}

    def finish(self) -> dict[str, Answer]:
        """Step until all have ended, and return their answers."""
        answers: dict[str, Answer] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            answers.update(self.step())
        return answers

    def in_flight(self) -> set[str]:
        """Requests in steps that are planned and whose result nobody has read."""
        steps = [step for _, step, _ in self.core.batch_queue or ()]
        requests = self.core.scheduler.requests
        names = {name for step in steps for name in step.num_scheduled_tokens if name in requests}
        return {name.rpartition("-")[0] for name in names}  # vLLM appends something random

    def abort(self, names: Sequence[str], *, running: bool) -> None:
        """Abort requests between two steps, or as a server that hears of it while the next one runs."""
        engine = self.llm.llm_engine
        if running:
            self.core.aborts_queue.put_nowait(engine.output_processor.abort_requests(names, internal=False))
        else:
            engine.abort_request(list(names))

    def left(self) -> dict[str, object]:
        """What requests hold, once the worker has been told of their end."""
        self.generate([{"prompt": "Hello."}], tokens=1)
        manager, runner = self.core.scheduler.encoder_cache_manager, self.runner
        told_next = self.core.scheduler.finished_req_ids
        return {
            "requests": len(self.core.scheduler.requests),
            "blocks": self.core.scheduler.kv_cache_manager.usage,
            "rows in use": manager.cache_size - manager.num_freeable_slots,
            "rows that no image has": manager.cache_size - manager.num_free_slots - held_rows(manager),
            "images that one side lacks": set(manager.cached) ^ set(self.rows()),
            "inputs of requests": set(getattr(runner.encoder_cache, "mm_features", ())) - told_next,
        }


NOTHING: dict[str, object] = {
    "requests": 0,
    "blocks": 0,
    "rows in use": 0,
    "rows that no image has": 0,
    "images that one side lacks": set(),
    "inputs of requests": set(),
}


def shared_engine(family: str, demo_model: Path, models: Mapping[str, Path]) -> SmallSteps:
    """The engine of a family that several modules use; of LLaVA, with the demo model."""
    model = demo_model if family == "llava" else models[family]
    return SHARED.get(f"{SMALL_STEPS}: {family}", lambda: SmallSteps(family, model))


def name_spare_token(model: Path) -> None:
    """Give one of a checkpoint's spare tokens the name that vLLM looks for: else it would add a token too many."""
    tokenizer = model / "tokenizer.json"
    text = tokenizer.read_text()
    assert text.count(SPARE) == 2
    tokenizer.write_text(text.replace(SPARE, "<prompt_embeds>"))


def distinct(answers: Sequence[Answer]) -> bool:
    """Whether no two answers are the same: else a test could not see that one was given for another."""
    return not any(one == other for one, other in itertools.combinations(answers, 2))
