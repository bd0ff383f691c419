"""Our series on the server's own ``/metrics``: right to the last one, and vLLM's own are left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from promprune_vllm.demo import photo_path
from promprune_vllm.demo.server import Server, serving
from promprune_vllm.metrics.catalog import CATALOG
from promprune_vllm.metrics.metric import UNPRUNED
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import ENVIRONMENT, MODEL, OPTIONS, Series, ask, body, grown, post, saved, series

pytestmark = pytest.mark.server
CHAT = "/v1/chat/completions"
BLOCK_TOKENS = 32
BYTES_PER_TOKEN = 6 * 2 * 6 * 64 * 4  # layers, keys and values, heads of 64, float32
WEIGHTS = 6 * (4 * 384 * 384 + 3 * 384 * 1024)  # layers of q, k, v, o of 384 x 384 and gate, up, down
PROMPTS = (  # photographs, visual tokens kept of each, budget; 576 are all
    (("chelsea",), (77,), 77),
    (("chelsea",), (77,), 77),  # from every cache
    (("chelsea", "rocket"), (11, 11), 11),
    (("rocket", "coffee"), (11, 576), [11, "full"]),  # the rocket from the caches
    (("coffee",), (145,), "25.1%"),
    (("coffee",), (145,), 145),  # said in another way
    (("chelsea", "coffee"), (21, 21), {"total": 42}),
    (("coffee",), (576,), "auto"),
    (("coffee",), (576,), "full"),
    (("coffee",), (576,), None),
    (("rocket",), (33,), 33),  # streamed
    (("rocket",), (34,), 34),  # streamed, and the client hangs up
)
ENCODED = 10  # times the encoder runs: for 8 pruned images, and for the coffee, which leaves its cache in between


@pytest.fixture(scope="module")
def two_of_each(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two API servers before two data-parallel engines."""
    options = ("--api-server-count", "2", "--data-parallel-size", "2")
    environment = {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    log = tmp_path_factory.mktemp("two") / "log"
    with serving(demo_model, *OPTIONS, *options, log=log, environment=environment) as running:
        yield running


@cache
def fresh(photo: str) -> str:
    """A photograph that no other test has put into a cache."""
    from PIL import Image

    with Image.open(photo_path(photo)) as image:
        width, height = image.size
        cropped = image.crop((0, 0, width - 1, height))
    return saved(cropped, "PNG")


def request(photos: Sequence[str], budget: object = None, **fields: Any) -> dict[str, Any]:
    sent = {} if budget is None else {"visual_token_budget": budget}
    return body(*(fresh(photo) for photo in photos), **sent, **fields)


def prompt_tokens(server: Server, photos: Sequence[str], budget: object, stream: bool, hang_up: bool) -> int:
    """Send one prompt, and return how long the engine says it is."""
    if not stream:
        answer = post(server, CHAT, request(photos, budget))
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])
    options = {"include_usage": True, "continuous_usage_stats": True}
    sent = request(photos, budget, stream=True, stream_options=options, max_tokens=500 if hang_up else 6)
    with httpx.stream("POST", f"{server.url}{CHAT}", json=sent, timeout=300) as response:
        events = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
        first = next(events)
        if not hang_up:
            list(events)
    return int(first["usage"]["prompt_tokens"])


def send_everything(server: Server) -> list[int]:
    """Send the prompts, and requests that count otherwise or not at all; return the prompts' lengths."""
    lengths = [
        prompt_tokens(server, photos, budget, stream=i >= len(PROMPTS) - 2, hang_up=i == len(PROMPTS) - 1)
        for i, (photos, _, budget) in enumerate(PROMPTS)
    ]
    assert post(server, CHAT, request((), 64)).status_code == 200  # text: the budget says nothing
    refused: tuple[tuple[tuple[str, ...], object], ...] = (
        (("chelsea",), 0),
        ((), {"total": 0}),
        (("chelsea",), [1, 2, 3]),
        (("chelsea", "rocket"), {"total": 1}),
    )
    for photos, budget in refused:
        assert post(server, CHAT, request(photos, budget)).status_code == 400
    assert post(server, CHAT, request(("chelsea",), visual_token_method="random")).status_code == 400
    # Four times 560 tokens are too many for the model: refused by vLLM once we are through.
    too_long = post(server, CHAT, request(("astronaut",) * 4, 560))
    assert too_long.status_code == 400
    assert "maximum" in too_long.text
    looking = request(("chelsea",), 5)
    only = {key: looking[key] for key in ("model", "messages", "visual_token_budget")}
    assert post(server, "/tokenize", only).status_code == 200
    return lengths


def flops(tokens: int) -> int:
    """Multiply-adds of a prefill, two each: all weights for every token, 6 layers of 384-wide scores and sums."""
    return 2 * (WEIGHTS * tokens + 6 * 2 * 384 * tokens * (tokens + 1) // 2)


def expected(lengths: Sequence[int]) -> Series:
    """The counters by hand."""
    blocks = work = 0
    for (_, kept, _), length in zip(PROMPTS, lengths, strict=True):
        before = length + sum(VISUAL_TOKENS - each for each in kept)
        blocks += math.ceil(before / BLOCK_TOKENS) - math.ceil(length / BLOCK_TOKENS)
        work += flops(before) - flops(length)
    images = [each for _, kept, _ in PROMPTS for each in kept]
    pruned = [each for each in images if each < VISUAL_TOKENS]
    full = len(images) - len(pruned)
    counts: Series = {
        ("requests_total", "pruned"): 9,
        ("requests_total", "full"): 3,
        ("requests_total", "text"): 1,
        ("requests_total", "refused"): 5,
        ("refused_requests_total", "invalid"): 2,
        ("refused_requests_total", "images"): 2,
        ("refused_requests_total", "method"): 1,
        ("budgets_total", "tokens"): 6,
        ("budgets_total", "list"): 1,
        ("budgets_total", "share"): 1,
        ("budgets_total", "total"): 1,
        ("budgets_total", "auto"): 1,
        ("budgets_total", "full"): 1,
        ("visual_tokens_seen_total", "promprune", "image"): VISUAL_TOKENS * len(pruned),
        ("visual_tokens_kept_total", "promprune", "image"): sum(pruned),
        ("visual_tokens_saved_total", "promprune", "image"): VISUAL_TOKENS * len(pruned) - sum(pruned),
        ("visual_tokens_seen_total", UNPRUNED, "image"): VISUAL_TOKENS * full,
        ("visual_tokens_kept_total", UNPRUNED, "image"): VISUAL_TOKENS * full,
        ("kv_cache_saved_bytes_total", "promprune"): blocks * BLOCK_TOKENS * BYTES_PER_TOKEN,
        ("prefill_flops_avoided_total", "promprune"): work,
        ("image_kept_tokens_count", "promprune", "image"): len(pruned),
        ("image_kept_tokens_sum", "promprune", "image"): sum(pruned),
        ("image_kept_tokens_count", UNPRUNED, "image"): full,
        ("image_kept_tokens_sum", UNPRUNED, "image"): VISUAL_TOKENS * full,
    }
    return {(f"promprune_{name}", *labels): value for (name, *labels), value in counts.items()}


def counted(after: Series, before: Series) -> Series:
    """What the API servers counted: all but the caches and what workers observe."""
    others = ("selection_seconds", "spectral_entropy", "saliency_share", "encoder_batch", "images_total")
    others += ("first_token_seconds",)
    changed = grown(after, before)
    return {
        key: value
        for key, value in changed.items()
        if not key[0].endswith("_bucket") and not key[0].startswith(tuple(f"promprune_{name}" for name in others))
    }


def test_a_script_of_requests_gives_the_counts_computed_by_hand(server: Server) -> None:
    before = series(server)
    lengths = send_everything(server)
    after = series(server)
    assert counted(after, before) == expected(lengths)
    changed = grown(after, before)
    assert {key: value for key, value in changed.items() if key[0] == "promprune_images_total"} == {
        ("promprune_images_total", "false", "promprune", "image"): 8,
        ("promprune_images_total", "true", "promprune", "image"): 3,
        ("promprune_images_total", "false", UNPRUNED, "image"): 1,
        ("promprune_images_total", "true", UNPRUNED, "image"): 3,
    }
    # The client that hung up may have left before its answer was complete.
    assert changed["promprune_first_token_seconds_count", "true"] in (8, 9)
    assert changed["promprune_first_token_seconds_count", "false"] == 3
    for pruned in ("true", "false"):
        assert 0 < changed["promprune_first_token_seconds_sum", pruned] < 60
    for stage in ("choose", "assemble"):
        assert changed["promprune_selection_seconds_count", "promprune", stage] == 8
        assert 0 < changed["promprune_selection_seconds_sum", "promprune", stage] < 60
    assert changed["promprune_spectral_entropy_count", "promprune"] == 8
    assert 0 < changed["promprune_spectral_entropy_sum", "promprune"] / 8 < 1
    assert changed["promprune_saliency_share_count", "promprune"] == 8
    assert 0 < changed["promprune_saliency_share_sum", "promprune"] / 8 < 1
    assert changed["promprune_encoder_batch_tokens_count",] == ENCODED
    assert changed["promprune_encoder_batch_tokens_sum",] == ENCODED * VISUAL_TOKENS


def test_kept_tokens_fall_into_their_buckets(server: Server) -> None:
    before = series(server)
    ask(server, "chelsea", visual_token_budget=64)
    changed = grown(series(server), before)
    bounds = [float(key[1]) for key in changed if key[0] == "promprune_image_kept_tokens_bucket"]
    assert min(bounds) == 64


@pytest.mark.release
def test_two_api_servers_and_two_engines_count_as_one(two_of_each: Server) -> None:
    before = series(two_of_each)
    lengths = send_everything(two_of_each)
    after = series(two_of_each)
    assert series(two_of_each) == after, "every scrape shows all processes, whichever answers it"
    assert counted(after, before) == expected(lengths)
    changed = grown(after, before)
    images = [value for key, value in changed.items() if key[0] == "promprune_images_total"]
    assert sum(images) == sum(len(photos) for photos, _, _ in PROMPTS)
    # Each engine has caches of its own, so what comes twice may be selected twice.
    selections = changed["promprune_selection_seconds_count", "promprune", "choose"]
    assert 8 <= selections <= 11
    assert changed["promprune_spectral_entropy_count", "promprune"] == selections


@pytest.mark.release
def test_whichever_engine_answers_the_answer_is_one(two_of_each: Server, server: Server) -> None:
    def ids(of: Server, budget: int | str) -> tuple[int, ...]:
        answer = ask(of, "rocket", "coffee", visual_token_budget=budget, return_token_ids=True)
        return tuple(answer["choices"][0]["token_ids"])

    budgets: tuple[int | str, ...] = (64, 65, "full")
    before = engines(two_of_each)
    for budget in budgets:
        assert {ids(two_of_each, budget) for _ in range(4)} == {ids(server, budget)}
    after = engines(two_of_each)
    assert all(after[engine] > before.get(engine, 0) for engine in ("0", "1")), "both were asked"


def engines(server: Server) -> dict[str, float]:
    """How many requests each engine has answered."""
    found: dict[str, float] = {}
    for family in server.families("vllm:request_success"):
        for sample in family.samples:
            if sample.name.endswith("_total"):
                found[sample.labels["engine"]] = found.get(sample.labels["engine"], 0) + sample.value
    return found


def test_every_series_of_the_catalogue_is_shown_with_its_help(server: Server) -> None:
    families = {family.name: family for family in server.families()}
    for metric in CATALOG:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind
        assert family.documentation == metric.help
        assert all(
            set(sample.labels) == {*metric.labels} | ({"le"} & set(sample.labels)) for sample in family.samples
        )
        assert {sample.labels["model_name"] for sample in family.samples} == {MODEL}
    ours = {name for name in families if name.startswith("promprune")}
    assert ours == {metric.name.removesuffix("_total") for metric in CATALOG}


def test_vllms_own_series_are_unchanged(server: Server, stock: Server) -> None:
    for each in (server, stock):
        ask(each, "coffee")

    def shown(of: Server) -> set[tuple[str, tuple[str, ...]]]:
        return {
            (sample.name, tuple(sorted(sample.labels)))
            for family in of.families()
            for sample in family.samples
            if not sample.name.startswith("promprune")
        }

    assert shown(server) == shown(stock)


@pytest.mark.release
def test_any_api_server_finds_what_any_engine_kept(two_of_each: Server) -> None:
    """Last: an inspected image is counted as a request."""
    asked = {"image": fresh("rocket"), "visual_token_budget": 91}
    told = [post(two_of_each, "/v1/visual_tokens/inspect", asked) for _ in range(6)]
    assert [reply.status_code for reply in told] == [200] * 6, told[-1].text
    assert {reply.json()["kept"] for reply in told} == {91}
    (indices,) = {tuple(reply.json()["indices"]) for reply in told}
    assert len(indices) == 91
