"""One vLLM engine inside this process, so that a test can look at what enters the language model."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch

from promprune_vllm.demo import photo_path
from promprune_vllm.demo.families import FAMILIES, build_family_model
from promprune_vllm.engine.compat import versions
from promprune_vllm.engine.worker.fault_isolation import cached_rows
from tests import runner
from tests.conftest import QUESTION

Ask = tuple[str, int | None]  # (photograph, budget)


def held_rows(manager: Any) -> int:
    """Rows of all images in the scheduler's account of the encoder cache, where no request holds any."""
    noted = manager.freeable if versions.before("0.31") else manager.num_embeds_by_hash
    return sum(noted.values())


@dataclass
class Seen:
    """What the language model and the vision tower were given while somebody watched."""

    embeds: list[torch.Tensor] = field(default_factory=list)
    images_per_tower_call: list[int] = field(default_factory=list)


class Engine:
    """The offline engine with the demo model, and ways to look inside."""

    def __init__(self, model: Path, **options: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        defaults = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "block_size": 32, "seed": 0}
        self.llm = LLM(str(model), **{**defaults, **options})
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.model = self.runner.model
        config = self.llm.llm_engine.vllm_config
        assert config.use_v2_model_runner == runner.is_v2()
        ahead = runner.schedules_ahead() and options.get("async_scheduling", True)
        assert config.scheduler_config.async_scheduling == ahead

    def close(self) -> None:
        """Give its memory back, so that the process can start another engine."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.runner, self.model
        gc.collect()

    def prompt(self, *asks: Ask, question: str = QUESTION, uuids: Sequence[str] | None = None) -> dict[str, Any]:
        """A prompt with one image per ask; they share the first one's budget."""
        from PIL import Image

        images = [Image.open(photo_path(name)).convert("RGB") for name, _ in asks]
        text = "".join("<image>\n" for _ in asks)
        prompt: dict[str, Any] = {
            "prompt": f"<s>USER: {text}{question} ASSISTANT:",
            "multi_modal_data": {"image": images if len(images) != 1 else images[0]},
        }
        if asks[0][1] is not None:
            prompt["mm_processor_kwargs"] = {"visual_token_budget": asks[0][1]}
        if uuids:
            prompt["multi_modal_uuids"] = {"image": list(uuids)}
        return prompt

    def generate(self, prompts: Sequence[dict[str, Any]], tokens: int = 6) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=3)
        return self.llm.generate(list(prompts), sampling, use_tqdm=False)

    def forget(self) -> None:
        """Empty every cache, so that the next request is encoded and prefilled."""
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.core.reset_encoder_cache()

    def rows(self) -> dict[str, torch.Tensor]:
        """The worker's encoder cache: identifier -> rows."""
        return dict(cached_rows(self.runner))

    def recomputes_positions(self) -> bool:
        """Whether the runner asks the model for positions again, once it has its images' embeddings."""
        if runner.is_v2():
            return self.runner.model_state.mm_pruner is not None
        return bool(self.runner.is_multimodal_pruning_enabled)

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        seen = Seen()

        def before_model(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("inputs_embeds") is not None:
                seen.embeds.append(kwargs["inputs_embeds"].clone())

        def before_tower(_: Any, args: tuple[Any, ...]) -> None:
            seen.images_per_tower_call.append(len(args[0]))

        handles = [
            self.model.register_forward_pre_hook(before_model, with_kwargs=True),
            self.model.vision_tower.register_forward_pre_hook(before_tower),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def pixels(self, photo: str) -> torch.Tensor:
        """``(1, 3, 336, 336)``: a photograph as the Hugging Face processor prepares it."""
        from PIL import Image
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self.llm.model_config.model)
        image = Image.open(photo_path(photo)).convert("RGB")
        return processor.image_processor(images=image, return_tensors="pt")["pixel_values"]


E = TypeVar("E", bound=Engine)


class Shared:
    """The one engine that is open for tests of several modules.

    There is never a second: vLLM's process groups belong to the process, and go when any engine in it is closed.
    Modules that share engines have the same ``TOGETHER``, and are run one after the other.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._engine: Any = None

    def get(self, name: str, make: Callable[[], E]) -> E:
        """Return the engine of this name: the one that is open, or a new one in its place."""
        if self._name != name:
            self.close()
            self._engine, self._name = make(), name
        return cast(E, self._engine)

    def close(self) -> None:
        if self._name is not None:
            self._name = None
            self._engine.close()


SHARED = Shared()
DEMO = "engines of the demo model"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Close the shared engine behind the last test that may use it."""
    following = getattr(getattr(nextitem, "module", None), "TOGETHER", None)
    if following is None or following != getattr(item.module, "TOGETHER", None):  # type: ignore[attr-defined]
        SHARED.close()


def pytest_exception_interact() -> None:
    """Close the shared engine after a failed test: one that died answers no more, and every test would wait."""
    SHARED.close()


@pytest.fixture
def engine(demo_model: Path) -> Engine:
    return SHARED.get("demo", lambda: Engine(demo_model))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model of each family."""
    root = tmp_path_factory.mktemp("families")
    return {family: build_family_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")  # tests of modules that share engines come in turns
def stock_answers(models: dict[str, Path]) -> dict[str, Any]:
    """What vLLM says without the plugin: family -> name of a prompt -> tokens and logprobs."""
    from tests.engine import family_facts, stock  # they import this module

    asked = {*family_facts.FAMILIES, *family_facts.VIDEO_ONLY}
    return stock.answers({family: path for family, path in models.items() if family in asked})
