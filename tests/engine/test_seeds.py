"""A seed on a CPU: vLLM cannot take random numbers back there, and its engine ended with the step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from promprune_vllm.demo.model import DemoModelSpec, build_demo_model
from tests.engine.conftest import Engine

pytestmark = pytest.mark.engine
STEP = 64


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    spec = DemoModelSpec(image_px=56, hidden=64, heads=2, mlp=128, layers=2)
    made = Engine(build_demo_model(tmp_path_factory.mktemp("small") / "model", spec), max_num_batched_tokens=STEP)
    yield made
    made.close()


def test_a_seed_gives_the_same_answer_in_however_many_steps_its_prompt_is_read(small: Engine) -> None:
    from vllm import SamplingParams

    prompts = [letter * 5 * STEP for letter in "yz"]
    sampling = SamplingParams(seed=7, temperature=0.8, max_tokens=8, ignore_eos=True)

    def answers() -> list[list[int]]:
        outputs = small.llm.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    in_steps = answers()  # the prefix cache is empty
    assert answers() == in_steps, "the last step of each prompt, whose rest is in the prefix cache"
    small.forget()
    for prompt, expected in zip(prompts, in_steps, strict=True):  # alone, in other steps
        (output,) = small.llm.generate([prompt], sampling, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == expected
