"""Every checkpoint that is shipped or built here, asked for the logprobs of whatever it may say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runner
from tests.checkpoints import CHECKPOINTS
from tests.engine.conftest import SHARED, Engine
from tests.engine.family_engine import FAMILY_ENGINES, shared_engine
from tests.engine.family_facts import FACTS, FAMILIES

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
# A name does not depend on the runner, and V2's kernels, interpreted, take a quarter of a second for each request.
REQUESTS, TOP = 10 if runner.is_v2() else 200, 20


@pytest.fixture(
    params=[name for name in CHECKPOINTS if name != "exported" and (name in FAMILIES or name not in FACTS)]
)
def engine(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    """All but what the training exports: it is the trained model, but for the weights."""
    name = request.param
    if name in FAMILIES:
        return shared_engine(name, models[name])

    def make() -> Engine:
        directory = CHECKPOINTS[name](tmp_path_factory.mktemp("model") / name)
        return Engine(directory, max_model_len=512, num_gpu_blocks_override=256, limit_mm_per_prompt={})

    return SHARED.get(f"text with {name}", make)


def test_answers_at_temperature_2_come_with_the_names_of_20_tokens_each(engine: Engine) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=2, max_tokens=8, ignore_eos=True, logprobs=TOP, prompt_logprobs=TOP, seed=0
    )
    outputs = engine.llm.generate([f"Question {i}?" for i in range(REQUESTS)], sampling, use_tqdm=False)
    named = names(engine)
    for output in outputs:
        positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(output.outputs[0].logprobs) == 8
        for position in positions:
            assert len(position) in (TOP, TOP + 1)
            assert all(isinstance(each.decoded_token, str) for each in position.values())
            assert set(position) <= set(named)


def test_the_ids_that_no_text_becomes_have_a_name_and_a_logprob(engine: Engine) -> None:
    from vllm import SamplingParams

    unused = [i for i, name in names(engine).items() if name.startswith("<unused_")]
    assert unused
    for ids in batched(unused, TOP):
        sampling = SamplingParams(max_tokens=2, logprobs=len(ids), logprob_token_ids=ids, allowed_token_ids=ids)
        (output,) = engine.llm.generate([{"prompt_token_ids": [1, ids[0]]}], sampling, use_tqdm=False)
        for position in output.outputs[0].logprobs:
            assert [position[i].decoded_token for i in ids] == [f"<unused_{i}>" for i in ids]


def batched(ids: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def names(engine: Engine) -> dict[int, Any]:
    """The names of all ids that the model can emit; those without one are left out."""
    ids = range(engine.llm.model_config.get_vocab_size())
    tokens = engine.llm.get_tokenizer().convert_ids_to_tokens(list(ids))
    return {i: token for i, token in zip(ids, tokens, strict=True) if token is not None}
