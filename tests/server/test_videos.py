"""Videos with a budget over HTTP: every route that takes one, what is told, refused and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from typer.testing import CliRunner

from promprune_vllm.cli import app
from promprune_vllm.demo.server import Server, is_healthy
from promprune_vllm.evaluation.records import FILE, read
from promprune_vllm.metrics.metric import UNPRUNED
from tests.clips import Clip
from tests.server.conftest import MODEL, Series, grown, image_url, post, saved, series
from tests.server.requests_with_videos import (
    BUDGET,
    BUDGETS,
    CHAT,
    ESCALATE,
    GENERATE,
    PHOTO,
    REFUSED,
    TEXT,
    URLS,
    answered,
    asked,
    photo,
    refused,
    told,
    video,
)
from tests.server.test_every_route import tampered
from tests.server.test_reply import events, headers, messages_request, responses_request

pytestmark = pytest.mark.server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", URLS)
def test_the_openai_sdk_gets_exactly_what_a_budget_says(videos: Server, form: str, stream: bool) -> None:
    url, frames = URLS[form]
    request: dict[str, Any] = asked(photo(), video(url), photo())
    request["extra_body"] = {"ignore_eos": request.pop("ignore_eos")}
    if stream:
        request |= {"stream": True, "stream_options": {"include_usage": True}}
    with openai.OpenAI(base_url=f"{videos.url}/v1", api_key="none", max_retries=0) as client:

        def ask(**fields: Any) -> tuple[Any, tuple[str | None, ...]]:
            sent = {**request, "extra_body": {**request["extra_body"], **fields}}
            reply = client.chat.completions.with_raw_response.create(**sent)
            counts = tuple(reply.headers.get(f"x-visual-tokens-{name}") for name in ("seen", "kept"))
            parsed: Any = reply.parse()
            return [chunk for chunk in parsed if chunk.usage][-1].usage if stream else parsed.usage, counts

        seen = (PHOTO, 15 * frames, PHOTO)
        whole, _ = ask()
        for budget, expected in BUDGETS:
            usage, counts = ask(visual_token_budget=budget)
            kept = expected[form]
            media = zip(("image", "video", "image"), seen, kept, strict=True)
            assert usage.visual_tokens == told(*media), budget
            assert whole.prompt_tokens - usage.prompt_tokens == sum(seen) - sum(kept), budget
            assert counts == (str(sum(seen)), str(sum(kept)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/invocations"])
def test_vllms_own_count_is_what_was_kept(videos: Server, path: str, stream: bool) -> None:
    """This model's placeholders hold nothing but visual tokens; docs/requests.md says how it is with others."""
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    for parts in ((photo(), video(), photo()), (photo(),), (video(),)):
        for budget in (None, 7, {"total": 20}, "full"):
            response = post(videos, path, asked(*parts, visual_token_budget=budget, **options))
            usage = events(response)[-1]["usage"] if stream else response.json()["usage"]
            ours = usage["visual_tokens"]
            kept = {name: sum(each["kept"] for each in ours.get(f"{name}s", ())) for name in ("image", "video")}
            theirs = usage["prompt_tokens_details"]["multimodal_tokens"]
            assert theirs == {name: tokens for name, tokens in kept.items() if tokens}, (parts, budget)


def test_downsample_of_the_evaluation_is_a_smaller_image(videos: Server, tmp_path: Path) -> None:
    """The server allows no such method, and needs none: this tower has native resolution."""
    out = ("--out", str(tmp_path), "--no-plots", "--json")
    asks = (
        "eval",
        "--url",
        videos.url,
        "--methods",
        "downsample",
        "--tasks",
        "presence",
        "--questions",
        "1",
        *out,
    )
    result = CliRunner().invoke(app, [*asks, "--budgets", "64,10%"])
    assert result.exit_code == 0, result.output
    kept = {answer.budget: (answer.seen, answer.kept) for answer in read(tmp_path / FILE).answers.values()}
    assert kept == {"full": (144, 144), "64": (64, 64), "10%": (9, 9)}
    left_out = CliRunner().invoke(app, [*asks, "--budgets", "64,10%,1"])
    assert left_out.exit_code == 0, left_out.output
    assert "'downsample' was left out at budget 1." in left_out.output


def test_where_vllms_own_count_is_missing_and_that_it_is_of_the_try_that_is_answered(videos: Server) -> None:
    """docs/requests.md says both, and this test when one is no longer true."""
    conversations = [asked(photo())["messages"], asked(photo(), photo())["messages"]]
    for path, request in (
        ("/v1/responses", responses_request(visual_token_budget=7)),
        ("/v1/messages", messages_request(visual_token_budget=7)),
        (f"{CHAT}/batch", {**asked(), "messages": conversations, BUDGET: 7}),
    ):
        response = post(videos, path, request)
        assert response.json()["usage"]["visual_tokens"]["kept"] in (7, 21)
        assert "multimodal_tokens" not in response.text
    again = asked(photo(), video(), **{BUDGET: 7, ESCALATE: {"below": 1, "to": 9}})
    streamed = {**again, "stream": True, "stream_options": {"include_usage": True}}
    for usage in (post(videos, CHAT, again).json()["usage"], events(post(videos, CHAT, streamed))[-1]["usage"]):
        assert usage["visual_tokens"]["first_tries"][0]["kept"] == 14
        assert usage["visual_tokens"]["kept"] == 18
        assert usage["prompt_tokens_details"]["multimodal_tokens"] == {"image": 9, "video": 9}


def test_a_list_is_in_order_of_appearance(videos: Server) -> None:
    short = video(Clip(4, "portrait").mp4_url())
    usage = answered(videos, video(), photo(), short, visual_token_budget=[3, 4, 5])
    assert usage["visual_tokens"] == told(("video", 45, 3), ("image", PHOTO, 4), ("video", 30, 5))
    usage = answered(videos, short, video(), photo(), visual_token_budget=[3, 4, 5])
    assert usage["visual_tokens"] == told(("video", 30, 3), ("video", 45, 4), ("image", PHOTO, 5))


def test_without_a_budget_and_without_a_video_replies_are_as_they_were(videos: Server) -> None:
    assert answered(videos, video())["visual_tokens"] == told(("video", 45, 45))
    assert "videos" not in answered(videos, photo())["visual_tokens"]
    assert post(videos, CHAT, asked(visual_token_budget=5)).json()["usage"].keys().isdisjoint({"visual_tokens"})


def test_routes_that_count_and_those_for_several_conversations_obey(videos: Server) -> None:
    parts, budget = (photo(), video()), [8, {"per_frame": 4}]
    assert answered(videos, *parts, path="/invocations", visual_token_budget=budget)["visual_tokens"]["kept"] == 20
    request = {name: asked(*parts)[name] for name in ("model", "messages")}
    whole = post(videos, "/tokenize", request)
    fewer = post(videos, "/tokenize", {**request, BUDGET: budget})
    assert headers(fewer) == (str(PHOTO + 45), "20")
    assert whole.json()["count"] - fewer.json()["count"] == PHOTO + 45 - 20
    conversations = [asked(*parts)["messages"], asked(video(), photo())["messages"]]
    for value, kept in (([8, 9], (8, 9, 8, 9)), ("full", (PHOTO, 45, 45, PHOTO))):
        reply = post(videos, f"{CHAT}/batch", {**asked(), "messages": conversations, BUDGET: value})
        media = zip(("image", "video", "video", "image"), (PHOTO, 45, 45, PHOTO), kept, strict=True)
        assert reply.json()["usage"]["visual_tokens"] == told(*media)
    conversations[1] = asked(video())["messages"]
    batch = {**asked(), "messages": conversations, BUDGET: [8, 9]}
    refused(videos, f"{CHAT}/batch", batch, "has 2 entries, but the prompt has 0 image(s) and 1 video(s)")


def test_routes_whose_requests_have_no_videos_say_so(videos: Server) -> None:
    """vLLM's schemas of these have none; docs/requests.md says it, and this test when it is no longer true."""
    parts = [{"type": "input_video", "video_url": URLS["mp4"][0]}, {"type": "input_text", "text": "What?"}]
    responses = {"model": MODEL, "input": [{"role": "user", "content": parts}], BUDGET: 5}
    refused(videos, "/v1/responses", responses, "Input should be")
    source = {"type": "base64", "media_type": "video/mp4", "data": URLS["mp4"][0].partition(",")[2]}
    messages = [{"role": "user", "content": [{"type": "video", "source": source}, TEXT]}]
    refused(videos, "/v1/messages", {"model": MODEL, "max_tokens": 1, "messages": messages}, "Input should be")


def test_rendered_features_carry_the_counts_of_each(videos: Server) -> None:
    for parts in ((photo(), video()), (video(), photo())):
        for budget, kept in (({}, PHOTO + 45), ({BUDGET: [6, 7]}, 13), ({BUDGET: {"total": 9}}, 9)):
            chat = post(videos, CHAT, asked(*parts, **budget, return_token_ids=True)).json()
            features = post(videos, f"{CHAT}/render", asked(*parts, **budget)).raise_for_status().json()
            response = post(videos, GENERATE, features)
            assert response.status_code == 200, response.text
            assert headers(response) == (str(PHOTO + 45), str(kept))
            assert response.json()["usage"]["visual_tokens"] == chat["usage"]["visual_tokens"]
            assert response.json()["choices"][0]["token_ids"] == chat["choices"][0]["token_ids"]
            if budget:
                refused(videos, GENERATE, {**features, **budget}, "to its render route")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_features_of_a_video_that_cannot_be_are_refused(videos: Server) -> None:
    made = post(videos, f"{CHAT}/render", asked(photo(), video(), visual_token_budget=9)).json()
    counts, text = "visual_token_counts_video", "visual_token_text_video"
    for field, value in (
        *((counts, value) for value in ([45, 10, 0], [8, 9, 0], [45, 9, 3], [45, 9, -1], [45, 9], [[45, 9, 0]])),
        *((text, value) for value in ([10**9], [-1], [1] * 5000)),
    ):
        error = refused(videos, GENERATE, tampered(made, "video", field, value), "features of a video cannot be")
        assert error["param"] == "features"
    # How many tokens a video has is only known to who encodes it: the request fails there, and it alone.
    assert post(videos, GENERATE, tampered(made, "video", counts, [46, 9, 0])).status_code == 500
    assert is_healthy(videos.url)
    assert post(videos, GENERATE, made).status_code == 200


def test_content_parts_obey(videos: Server) -> None:
    marks = [f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image")]
    ids = post(videos, "/tokenize", {"model": MODEL, "prompt": " and ".join(marks)}).json()["tokens"]
    parts = [{"type": "image_url", "url": image_url("coffee")}, {"type": "video_url", "url": URLS["mp4"][0]}]
    request = {"token_ids": ids, "content_parts": parts, "sampling_params": {"max_tokens": 1}}
    response = post(videos, GENERATE, {**request, BUDGET: [6, 12]})  # in the order of the prompt
    assert response.json()["usage"]["visual_tokens"] == told(("video", 45, 6), ("image", PHOTO, 12))
    misplaced = {**request, "content_parts": [parts[0], {**parts[1], BUDGET: 6}]}
    refused(videos, GENERATE, misplaced, "at the top level of the request")


@pytest.mark.parametrize(("budget", "parts", "message"), REFUSED, ids=[each[2][:40] for each in REFUSED])
def test_what_fits_no_video_is_refused(
    videos: Server, budget: Any, parts: tuple[dict[str, Any], ...], message: str
) -> None:
    for path in (CHAT, f"{CHAT}/render"):
        assert refused(videos, path, asked(*parts, visual_token_budget=budget), message)["param"] == BUDGET


def test_encoded_videos_keep_their_tokens(videos: Server) -> None:
    import torch
    from vllm.utils.serial_utils import tensor2base64

    tensors = {"video_embeds": torch.zeros(12, 128), "video_grid_thw": torch.tensor([2, 4, 6])}
    part = {"type": "video_embeds", "video_embeds": {name: tensor2base64(each) for name, each in tensors.items()}}
    assert answered(videos, part)["visual_tokens"] == told(("video", 12, 12))
    refused(videos, CHAT, asked(part, visual_token_budget=5), "cannot be applied to video_embeds")


def test_a_clip_is_named_with_the_budget_it_was_sent_with(videos: Server) -> None:
    named = {"type": "video_url", "video_url": None, "uuid": "a clip"}
    sent, again = (answered(videos, each, visual_token_budget=11) for each in (video(uuid="a clip"), named))
    details = [usage.pop("prompt_tokens_details")["multimodal_tokens"] for usage in (sent, again)]
    assert (again, details) == (sent, [{"video": 11}] * 2)
    message = "Cache miss for video at index 0 but data is not provided. With 12 of its 45 tokens"
    error = refused(videos, CHAT, asked(named, visual_token_budget=12), message)
    assert "Send the video itself once" in error["message"]


@pytest.mark.parametrize(
    ("again", "kept"),
    [(1, (PHOTO, 45)), ({"below": 1, "to": 20}, (20, 20)), ({"below": 1, "to": "25%"}, (62, 12))],
)
def test_an_unsure_answer_about_a_clip_is_asked_for_again(
    videos: Server, again: Any, kept: tuple[int, int]
) -> None:
    request = asked(photo(), video(), max_tokens=9)
    direct = post(videos, CHAT, {**request, BUDGET: list(kept)}).json()
    reply = post(videos, CHAT, {**request, BUDGET: [4, 9], ESCALATE: again}).json()
    (first,) = reply["usage"]["visual_tokens"].pop("first_tries")
    assert (first["asked_again"], first["kept"]) == (True, 13)
    assert first["prompt_tokens"] == direct["usage"]["prompt_tokens"] - sum(kept) + 13
    own = [each["usage"].pop("prompt_tokens_details")["multimodal_tokens"] for each in (reply, direct)]
    assert own == [dict(zip(("image", "video"), kept, strict=True))] * 2
    assert reply["usage"] == direct["usage"]
    assert reply["choices"] == direct["choices"]
    stream = {
        **request,
        BUDGET: [4, 9],
        ESCALATE: again,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    streamed = post(videos, CHAT, stream)
    assert headers(streamed) == (str(PHOTO + 45), "13"), "a stream's headers tell the first try"
    usage = next(event["usage"] for event in events(streamed) if event.get("usage"))
    assert (usage["visual_tokens"]["kept"], usage["prompt_tokens"]) == (
        sum(kept),
        direct["usage"]["prompt_tokens"],
    )


def test_a_script_of_requests_gives_the_counts_computed_by_hand(videos: Server) -> None:
    clip = video(Clip(9, "portrait").frames_url())  # 5 frames of 15 tokens
    frame = photo(saved(Image.fromarray(Clip(1).pixels[0]), "PNG"))  # 15 tokens
    script: list[tuple[tuple[dict[str, Any], ...], dict[str, Any]]] = [
        ((clip,), {BUDGET: 10}),
        ((clip,), {BUDGET: {"per_frame": 2}}),  # 10 as well, from the cache
        ((frame, clip), {BUDGET: [4, "full"]}),
        ((clip, frame, clip), {BUDGET: {"total": 33}}),  # 15, 3 and 15
        ((frame, clip), {}),
        ((frame, clip), {BUDGET: "20%"}),  # 3 and 15
        ((frame,), {BUDGET: 5}),
        ((), {BUDGET: 5}),
    ]
    before = series(videos)
    for parts, fields in script:
        assert post(videos, CHAT, asked(*parts, **fields)).status_code == 200
    refused(videos, CHAT, asked(clip, visual_token_budget=[1, 2]), "has 2 entries")
    changed = grown(series(videos), before)
    counters = ("requests_total", "budgets_total", "refused_", "visual_tokens_", "image_kept_tokens_")
    found = {
        (key[0].removeprefix("promprune_"), *key[1:]): value
        for key, value in changed.items()
        if key[0].startswith(tuple(f"promprune_{name}" for name in counters)) and not key[0].endswith("_bucket")
    }
    assert found == expected_counts()
    images = {key[1:]: value for key, value in changed.items() if key[0] == "promprune_images_total"}
    assert images == {
        ("false", "promprune", "video"): 3,  # of a prompt that has it twice, both
        ("true", "promprune", "video"): 2,
        ("false", UNPRUNED, "video"): 1,
        ("true", UNPRUNED, "video"): 1,
        ("false", "promprune", "image"): 3,
        ("true", "promprune", "image"): 1,
        ("false", UNPRUNED, "image"): 1,
    }


def expected_counts() -> Series:
    """The counters of the script, by name and labels."""
    tokens = {  # before and after
        ("promprune", "video"): (5 * 75, 10 + 10 + 15 + 15 + 15),
        (UNPRUNED, "video"): (2 * 75, 2 * 75),
        ("promprune", "image"): (4 * 15, 4 + 3 + 3 + 5),
        (UNPRUNED, "image"): (15, 15),
    }
    items = {("promprune", "video"): 5, (UNPRUNED, "video"): 2, ("promprune", "image"): 4, (UNPRUNED, "image"): 1}
    counts: Series = {
        ("requests_total", "pruned"): 6,
        ("requests_total", "full"): 1,
        ("requests_total", "text"): 1,
        ("requests_total", "refused"): 1,
        ("refused_requests_total", "images"): 1,
        ("budgets_total", "tokens"): 2,
        **{("budgets_total", form): 1 for form in ("per_frame", "list", "total", "share")},
    }
    for labels, (seen, kept) in tokens.items():
        counts["visual_tokens_seen_total", *labels] = seen
        counts["visual_tokens_kept_total", *labels] = counts["image_kept_tokens_sum", *labels] = kept
        counts["image_kept_tokens_count", *labels] = items[labels]
        if seen > kept:
            counts["visual_tokens_saved_total", *labels] = seen - kept
    return counts
