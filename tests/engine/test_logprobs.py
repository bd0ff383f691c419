"""Every checkpoint that is shipped or built here, asked for the logprobs of whatever it may say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.checkpoints import CHECKPOINTS
from tests.engine.conftest import Engine
from tests.engine.family_engine import UNLOADABLE

pytestmark = pytest.mark.engine
REQUESTS, TOP = 200, 20


@pytest.fixture(scope="module", params=[name for name in CHECKPOINTS if name != "exported"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """All but what the training exports: it is the trained model, but for the weights."""
    if request.param in UNLOADABLE:
        pytest.skip("vLLM 0.29 for CPUs cannot load Qwen3-VL")
    directory = CHECKPOINTS[request.param](tmp_path_factory.mktemp("model") / request.param)
    made = Engine(directory, max_model_len=512, num_gpu_blocks_override=256, limit_mm_per_prompt={})
    yield made
    made.close()


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
