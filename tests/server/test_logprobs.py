"""Logprobs and token ids on every route that has a field for them: of named ids, and of ids without a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from promprune_vllm.demo.server import Server, is_healthy
from tests.checkpoints import with_unnamed_ids
from tests.server.conftest import MODEL, _serving, body, image_url, post

pytestmark = pytest.mark.server
CHAT, BATCH, COMPLETIONS = "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions"
RESPONSES, GENERATE = "/v1/responses", "/inference/v1/generate"
UNUSED = 350  # of 384 rows: <unused_350>, or without a name where the tokenizer ends at 343
TOP = {"logprobs": True, "top_logprobs": 20}
MESSAGES: list[dict[str, Any]] = body("coffee")["messages"]
PROMPTS: Mapping[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES, "visual_token_budget": 16},
    BATCH: {"messages": [MESSAGES, MESSAGES]},
    COMPLETIONS: {"prompt": [5, UNUSED]},
    RESPONSES: {"input": "is there a red star?", "temperature": 2, "max_output_tokens": 16},
    "/generative_scoring": {"query": "is", "items": ["a", "the"], "label_token_ids": [UNUSED, 5]},
    GENERATE: {"token_ids": [5, UNUSED]},
}
SAID = {"allowed_token_ids": [UNUSED], "max_tokens": 2}
# Without allowed ids: until 0.32, beam search ignores them, and 0.33 refuses them with its first model runner.
BEAMS = {"use_beam_search": True, "n": 2, "max_tokens": 2}
CASES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {**SAID, **TOP}),
    (CHAT, {**SAID, **TOP, "stream": True}),
    (CHAT, {**SAID, **TOP, "n": 3, "temperature": 2}),
    (CHAT, {**SAID, **TOP, "return_tokens_as_token_ids": True}),
    (CHAT, {**SAID, **TOP, "skip_special_tokens": False, "stop": ["x"]}),
    (CHAT, {**SAID, "prompt_logprobs": 20}),
    (CHAT, {**SAID, "return_token_ids": True}),
    (CHAT, {**SAID, **TOP, "echo": True}),
    (CHAT, {"logprobs": True, "logprob_token_ids": [UNUSED, 5], "max_tokens": 2}),
    (CHAT, BEAMS),
    (BATCH, {**SAID, **TOP}),
    (COMPLETIONS, {**SAID, "logprobs": 5}),
    (COMPLETIONS, {**SAID, "logprobs": 5, "stream": True}),
    (COMPLETIONS, {**SAID, "logprobs": 5, "echo": True}),
    (COMPLETIONS, {**SAID, "logprobs": 5, "return_tokens_as_token_ids": True, "return_token_ids": True}),
    (COMPLETIONS, {**SAID, "prompt_logprobs": 5}),
    (COMPLETIONS, {"logprobs": 2, "logprob_token_ids": [UNUSED, 5], "max_tokens": 2}),
    (COMPLETIONS, BEAMS),
    (RESPONSES, {"top_logprobs": 20, "include": ["message.output_text.logprobs"]}),
    ("/generative_scoring", {}),
    (GENERATE, {"sampling_params": {**SAID, "logprobs": 20, "prompt_logprobs": 20}}),
]


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The trained model, with 41 ids that its tokenizer has no name for."""
    directory = tmp_path_factory.mktemp("padded")
    yield from _serving(with_unnamed_ids(directory / "model"), directory, "--enable-scale-out")


@pytest.fixture(params=["every_method", pytest.param("padded", marks=pytest.mark.release)])
def asked(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(request.param)
    return server


def lives(server: Server) -> bool:
    return server.process.poll() is None and is_healthy(server.url)


@pytest.mark.parametrize(("path", "fields"), CASES)
def test_every_field_is_answered_and_the_server_lives(asked: Server, path: str, fields: dict[str, Any]) -> None:
    response = post(asked, path, {"model": MODEL, **PROMPTS[path], **fields})
    off = path == GENERATE and asked.log.parent.name.startswith("every-method")
    assert response.status_code == (403 if off else 200), response.text
    assert '"error":{' not in response.text or off
    assert lives(asked)


@pytest.mark.release
def test_an_id_without_a_name_has_an_empty_text_and_a_logprob(every_method: Server, padded: Server) -> None:
    wanted = {"model": MODEL, **PROMPTS[CHAT], **SAID, **TOP}
    for server, name in ((every_method, f"<unused_{UNUSED}>"), (padded, "")):
        choice = post(server, CHAT, wanted).raise_for_status().json()["choices"][0]
        assert not choice["message"]["content"]
        said = choice["logprobs"]["content"]
        assert [each["token"] for each in said] == [name, name]
        assert all(bytes(each["bytes"]).decode() == name and each["logprob"] < 0 for each in said)
        assert all(len(each["top_logprobs"]) == 20 for each in said)


def test_200_requests_at_temperature_2_with_20_tokens_each_are_all_answered(asked: Server) -> None:
    def ask(seed: int) -> int:
        question = [{"role": "user", "content": "is there a red star?"}]
        wanted = {"model": MODEL, "messages": question, "temperature": 2, "seed": seed, "max_tokens": 4, **TOP}
        return post(asked, CHAT, wanted).status_code

    with ThreadPoolExecutor(16) as clients:
        assert set(clients.map(ask, range(200))) == {200}
    assert lives(asked)


@pytest.mark.parametrize(
    ("ids", "status"),
    [([5, UNUSED], 200), ([383, 384, 10**6, 2**32 - 1], 200), ([2**32], 400), ([2**63], 400), ([-1], 400)],
)
def test_any_ids_can_be_detokenized_or_are_refused(asked: Server, ids: list[int], status: int) -> None:
    response = post(asked, "/detokenize", {"model": MODEL, "tokens": ids})
    assert response.status_code == status, response.text
    assert lives(asked)


def test_tokenize_names_what_a_text_becomes(asked: Server) -> None:
    for prompt in ({"prompt": f"a <unused_{UNUSED}>"}, {"messages": MESSAGES, "visual_token_budget": 4}):
        answer = post(asked, "/tokenize", {"model": MODEL, "return_token_strs": True, **prompt}).raise_for_status()
        assert len(answer.json()["token_strs"]) == answer.json()["count"]


def test_an_id_beyond_the_last_row_is_refused(asked: Server) -> None:
    for path, fields in (
        (COMPLETIONS, {"prompt": [5, 384]}),
        (COMPLETIONS, {"prompt": [5], "logprobs": 1, "logprob_token_ids": [384]}),
        (CHAT, {"messages": MESSAGES, **TOP, "allowed_token_ids": [384]}),
        (CHAT, {"messages": MESSAGES, **TOP, "logit_bias": {"384": 1}}),
    ):
        assert post(asked, path, {"model": MODEL, **fields}).status_code == 400
    assert lives(asked)


@pytest.mark.release
def test_a_picture_of_a_shared_batch_is_answered_beside_ids_without_a_name(padded: Server) -> None:
    """In stock vLLM every open request fails with the one that asks."""
    bystander = {"model": MODEL, "messages": body(image_url("rocket"))["messages"], "max_tokens": 40}
    with ThreadPoolExecutor(4) as clients:
        waiting = [clients.submit(post, padded, CHAT, {**bystander, "ignore_eos": True}) for _ in range(3)]
        asking = {"model": MODEL, **PROMPTS[COMPLETIONS], "prompt_logprobs": 0}
        assert post(padded, COMPLETIONS, asking).status_code == 200
        assert [each.result().status_code for each in waiting] == [200, 200, 200]
