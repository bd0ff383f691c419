"""LLaVA-1.5 inside real vLLM: what enters the language model, and what the engine accounts for."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from promprune_vllm import Need, get_method, methods, select
from promprune_vllm.config import Settings
from promprune_vllm.core.budget import FIELD, BudgetRequest
from promprune_vllm.demo import PHOTOS
from promprune_vllm.engine.api_server.pruning_plan import Plan
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.errors import BudgetError, SettingsError
from tests.conftest import QUESTION, VISUAL_TOKENS
from tests.engine import naming
from tests.engine.conftest import DEMO, Engine

pytestmark = pytest.mark.engine
TOGETHER = DEMO
EVERYTHING = Need.PROJECTED | Need.ENCODER | Need.KEYS | Need.SALIENCY
BAD = (0, -3, 10**12, 1e12, 64.5, "abc", "064", "0%", True, float("nan"), {}, {"total": 0}, [], [64, "x"])


def _features(engine: Engine, photo: str) -> Any:
    (image,) = engine.model.capture({"pixel_values": engine.pixels(photo)}, slice(0, 1), EVERYTHING)
    (group,) = image.groups
    return group.features


def _image_rows(engine: Engine, output: Any, embeds: list[torch.Tensor]) -> torch.Tensor:
    """Rows of the prompt's prefill at the image's placeholder."""
    image = engine.llm.model_config.hf_config.image_token_index
    where = [i for i, token in enumerate(output.prompt_token_ids) if token == image]
    return torch.cat(embeds)[where]


@pytest.mark.parametrize("keep", [1, 2, 64, 575])
@pytest.mark.parametrize("photo", ["astronaut", "rocket"])
def test_rows_of_the_language_model_are_the_selected_ones_bit_for_bit(
    engine: Engine, photo: str, keep: int
) -> None:
    engine.forget()
    with torch.inference_mode():
        features = _features(engine, photo)
        full = engine.model.embed_unpruned(pixel_values=engine.pixels(photo))[0]
    assert torch.equal(features.projected, full)
    expected = full[select(features, keep).indices]
    with engine.watched() as seen:
        (output,) = engine.generate([engine.prompt((photo, keep))], tokens=1)
    assert torch.equal(_image_rows(engine, output, seen.embeds), expected)


SERVABLE = [name for name, method in methods(over_frames=False).items() if not method.needs & ~EVERYTHING]


@pytest.mark.parametrize("name", SERVABLE)
def test_every_method_the_family_supplies_is_served_exactly(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine.forget()
    method = get_method(name)
    monkeypatch.setattr(engine.model, "_methods", [method])
    with torch.inference_mode():
        features = _features(engine, "coffee")
        chosen = select(features, 50, method)
        rows = features.projected[chosen.indices] if chosen.rows is None else chosen.rows
        if chosen.rows is not None and chosen.space is Need.ENCODER:  # not those of downsample
            rows = engine.model.project(rows)
    with engine.watched() as seen:
        (output,) = engine.generate([engine.prompt(("coffee", 50))], tokens=1)
    assert torch.equal(_image_rows(engine, output, seen.embeds), rows)


def test_a_method_the_family_cannot_supply_is_refused_at_start_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from promprune_vllm.engine.families.llava import PrunedLlavaProcessor

    monkeypatch.setenv("PROMPRUNE_METHOD", "visionzip")
    monkeypatch.setattr(PrunedLlavaProcessor, "supplies", Need.PROJECTED | Need.SALIENCY)
    with pytest.raises(SettingsError, match=r"'visionzip' needs ENCODER, KEYS.*LlavaForCond.*: .*promprune"):
        MULTIMODAL_REGISTRY.create_processor(engine.llm.model_config)


def test_both_stages_of_promprune_are_exercised(engine: Engine) -> None:
    with torch.inference_mode():
        salient = [int(select(_features(engine, photo), 64).report["saliency_tokens"]) for photo in PHOTOS]
    assert min(salient) < 64
    assert max(salient) > 0


@pytest.mark.parametrize("photo", ["astronaut", "coffee"])
def test_saliency_equals_eager_attention_of_transformers(engine: Engine, photo: str) -> None:
    from transformers import LlavaForConditionalGeneration

    reference = LlavaForConditionalGeneration.from_pretrained(
        engine.llm.model_config.model, attn_implementation="eager", dtype=torch.float32
    )
    tower = reference.model.vision_tower
    with torch.inference_mode():
        attentions = tower(engine.pixels(photo), output_attentions=True).attentions
        saliency = _features(engine, photo).saliency
    # hidden_states[-2] is the output of the last layer but one: its attention is attentions[-2]
    wanted, off_by_one = (attentions[layer][0, :, 0, 1:].mean(dim=0) for layer in (-2, -3))
    assert float((saliency - wanted).abs().max()) < 1e-6
    assert float((saliency - off_by_one).abs().max()) > 1e-4, "the wrong layer would pass as well"


def test_encoder_features_and_keys_equal_those_of_transformers(engine: Engine) -> None:
    from transformers import LlavaForConditionalGeneration

    reference = LlavaForConditionalGeneration.from_pretrained(engine.llm.model_config.model, dtype=torch.float32)
    tower, pixels = reference.model.vision_tower, engine.pixels("coffee")
    attention = dict(tower.named_modules())["encoder.layers.3.self_attn"]
    keys: list[torch.Tensor] = []
    attention.k_proj.register_forward_hook(lambda _, __, out: keys.append(out))
    with torch.inference_mode():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        features = _features(engine, "coffee")
    assert torch.allclose(features.encoder, hidden, atol=1e-5)
    heads = keys[0][0, 1:].unflatten(-1, (attention.num_heads, -1))  # (N, H, d)
    assert torch.allclose(features.keys, heads.mean(dim=1), atol=1e-5)


@pytest.mark.parametrize("size", [(500, 300), (300, 500), (336, 336)], ids=str)
def test_tokens_look_where_the_boxes_say(engine: Engine, size: tuple[int, int]) -> None:
    """Of an image that is cut to its middle, too: a bright block changes the tokens whose boxes hold it most."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(engine.llm.model_config.model).image_processor

    def rows(image: Image.Image) -> torch.Tensor:
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return engine.model.embed_unpruned(pixel_values=pixels)[0]

    width, height = size
    dark = Image.new("RGB", size, (20, 20, 20))
    lit, block = dark.copy(), (width // 2, 0, width, height // 2)
    lit.paste((240, 240, 240), block)
    change = (rows(lit) - rows(dark)).norm(dim=1)
    boxes = engine.llm.llm_engine.renderer.get_mm_processor().boxes(width, height)
    assert len(boxes) == len(change) == VISUAL_TOKENS
    inside = [box[0] >= block[0] and box[3] <= block[3] for box in boxes]
    outside = [box[2] <= block[0] or box[1] >= block[3] for box in boxes]
    assert change[torch.tensor(inside)].min() > change[torch.tensor(outside)].max()
    left, top, right, bottom = (f(box[i] for box in boxes) for i, f in enumerate((min, min, max, max)))
    side = min(size)  # CLIP's processor cuts the square out of the middle
    middle = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    assert (left, top, right, bottom) == pytest.approx(middle, abs=1)


def test_prompt_tokens_drop_by_exactly_what_is_pruned(engine: Engine) -> None:
    budgets = (None, 576, 5000, 575, 256, 64, 2, 1)
    outputs = engine.generate([engine.prompt(("coffee", budget)) for budget in budgets], tokens=1)
    lengths = [len(output.prompt_token_ids) for output in outputs]
    kept = [min(budget or VISUAL_TOKENS, VISUAL_TOKENS) for budget in budgets]
    assert [lengths[0] - length for length in lengths] == [VISUAL_TOKENS - k for k in kept]


def test_each_of_several_images_keeps_the_budget(engine: Engine) -> None:
    outputs = engine.generate(
        [engine.prompt(("coffee", budget), ("rocket", budget)) for budget in (None, 40)], tokens=1
    )
    full, pruned = (len(output.prompt_token_ids) for output in outputs)
    assert full - pruned == 2 * (VISUAL_TOKENS - 40)


def test_budgets_that_prune_share_nothing_and_the_others_share_one_entry(engine: Engine) -> None:
    engine.forget()
    cached = {}
    with engine.watched() as seen:
        for budget in (None, 576, 5000, 64, 63, 64):
            (output,) = engine.generate([engine.prompt(("chelsea", budget))], tokens=1)
            cached.setdefault(budget, []).append(output.num_cached_tokens)
    # Without a budget, 64 and 63 are encoded; everything else comes from a cache.
    assert seen.images_per_tower_call == [1, 1, 1]
    assert cached[None] == [0]
    assert cached[576] == cached[5000] != [0]
    # 64 misses, and hits when repeated. Blocks before the image's first one hold no image: nothing is shared.
    assert cached[64][0] == 0
    assert cached[64][1] > 32
    assert cached[63] == [0]


def _keys(engine: Engine, prompt: dict[str, Any]) -> list[str]:
    (processed,) = engine.llm.llm_engine.renderer.render_cmpl([prompt])
    return list(processed["mm_hashes"]["image"])


def test_a_budget_is_parsed_once_and_the_program_may_send_its_object_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[object] = []
    parse = BudgetRequest.parse

    def counted(value: object) -> BudgetRequest:
        parsed.append(value)
        return parse(value)

    monkeypatch.setattr(BudgetRequest, "parse", counted)
    prompt = engine.prompt(("coffee", 40))
    for budget in (40, 30):
        prompt["mm_processor_kwargs"][FIELD] = budget
        (output,) = engine.generate([prompt], tokens=1)
        image = engine.llm.model_config.hf_config.image_token_index
        assert list(output.prompt_token_ids).count(image) == budget
    assert parsed == [40, 30]


def test_cache_keys(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(budget: int | None, **more: Any) -> str:
        return _keys(engine, engine.prompt(("chelsea", budget), **more))[0]

    assert key(None) == key(576) == key(5000)
    pruned = [key(budget) for budget in (1, 2, 64, 575)]
    assert len({key(None), *pruned}) == 5
    # A client's uuid names the image, not what is kept of it; and it cannot pass for somebody's pruned image.
    assert key(None, uuids=["mine"]) == "mine"
    assert key(64, uuids=["mine"]) not in {"mine", key(64), key(63, uuids=["mine"])}
    assert key(None, uuids=[key(64)]) != key(64)
    processor = engine.llm.llm_engine.renderer.get_mm_processor()
    other = replace(processor._methods, digests=(Settings(method="random").digest(),))
    monkeypatch.setattr(processor, "_methods", other)
    assert key(64) not in pruned, "another method would be served from promprune's cache entry"


def test_client_uuid_with_two_budgets_is_encoded_twice(engine: Engine) -> None:
    engine.forget()
    with engine.watched() as seen:
        lengths = [
            len(engine.generate([engine.prompt(("rocket", budget), uuids=["U1"])], tokens=1)[0].prompt_token_ids)
            for budget in (None, 64, 16, 64)
        ]
    assert seen.images_per_tower_call == [1, 1, 1]
    assert [lengths[0] - length for length in lengths] == [0, 512, 560, 512]


@pytest.mark.parametrize("check", naming.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_an_image_that_is_named_and_not_sent(engine: Engine, check: Any) -> None:
    check(engine, lambda: engine.prompt(("coffee", None)))


def test_of_named_images_none_is_taken_for_another(engine: Engine) -> None:
    naming.check_another_image_is_never_served(
        engine, lambda: engine.prompt(("coffee", None)), lambda: engine.prompt(("rocket", None))
    )
    naming.check_some_of_several_are_named(engine, lambda: engine.prompt(("coffee", None), ("rocket", None)))


def test_kv_blocks_and_encoder_cache_hold_only_what_is_kept(engine: Engine) -> None:
    from vllm import SamplingParams

    scheduler = engine.core.scheduler
    used = {}
    for budget in (None, 64):
        engine.forget()
        free_rows = scheduler.encoder_cache_manager.num_free_slots
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        engine.llm.llm_engine.add_request(f"r{budget}", engine.prompt(("coffee", budget)), sampling)
        before = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        engine.llm.llm_engine.step()
        (request,) = scheduler.running
        used[budget] = {
            "prompt": request.num_prompt_tokens,
            "blocks": before - scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            "encoder rows": free_rows - scheduler.encoder_cache_manager.num_free_slots,
            "stored rows": sum(rows.shape[0] for rows in engine.rows().values()),
        }
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.llm.llm_engine.step()
    assert used[None]["encoder rows"] - used[64]["encoder rows"] == VISUAL_TOKENS - 64
    for use in used.values():  # what the demo's column says: a block for every 32 tokens begun
        assert use["blocks"] == -(-use["prompt"] // 32)
    assert used[None]["blocks"] - used[64]["blocks"] == (VISUAL_TOKENS - 64) // 32
    assert used[64]["stored rows"] == 64


def test_encoder_calls_are_bounded_by_unpruned_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler charges 16 tokens an image, so a step brings 24; the memory profile was of fewer in a call."""
    tower, largest = engine.model.vision_tower, {}

    def peak(name: str) -> list[int]:
        def after(_: Any, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                largest[name] = max(largest.get(name, 0), output.numel() * output.element_size())

        engine.forget()
        asks = [engine.prompt((PHOTOS[i % 4], 16 + i % 2), question=f"{i}?") for i in range(24)]
        for i, ask in enumerate(asks):  # a content of its own
            ask["multi_modal_data"]["image"] = ask["multi_modal_data"]["image"].rotate(i)
        handles = [module.register_forward_hook(after) for module in tower.modules()]
        with engine.watched() as seen:
            engine.generate(asks, tokens=1)
        for handle in handles:
            handle.remove()
        assert sum(seen.images_per_tower_call) == len(asks)
        return seen.images_per_tower_call

    limit = engine.model._encoder_tokens // VISUAL_TOKENS
    bounded = peak("bounded")
    assert max(bounded) == limit < 24
    monkeypatch.setattr(engine.model, "_encoder_tokens", 10**9)
    unbounded = peak("unbounded")
    print(f"images per encoder call: {bounded}, else {unbounded}; largest activation in bytes: {largest}")
    assert max(unbounded) > 2 * limit
    assert largest["unbounded"] / largest["bounded"] == max(unbounded) / limit


def test_mixed_batch_equals_one_by_one(engine: Engine) -> None:
    asks = [
        engine.prompt((PHOTOS[i % 4], budget), question=f"{QUESTION} {i}")
        for i, budget in enumerate((None, 16, 64, 192, 576, 1, 575, 64))
    ]
    engine.forget()
    alone = [engine.generate([ask])[0] for ask in asks]
    engine.forget()
    together = engine.generate(asks)
    again = engine.generate(asks)  # every cache hot
    for one, batched, hot in zip(alone, together, again, strict=True):
        assert one.outputs[0].token_ids == batched.outputs[0].token_ids == hot.outputs[0].token_ids


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_bad_budgets_are_refused_offline_too(engine: Engine, value: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    prompt = engine.prompt(("coffee", 64))
    prompt["mm_processor_kwargs"] = {"visual_token_budget": value}
    with pytest.raises(VLLMValidationError, match=r"visual_token_budget(\[\d\])? must be .* 1000000") as refused:
        engine.generate([prompt], tokens=1)
    assert refused.value.parameter == "visual_token_budget"
    del prompt["multi_modal_data"]
    prompt["prompt"] = "no image"
    with pytest.raises(VLLMValidationError):
        engine.generate([prompt], tokens=1)


@pytest.mark.parametrize("value", [5, True, ["low", 5], {"a": 1}, 0.5j], ids=repr)
def test_an_option_of_a_wrong_type_is_refused_by_its_name(engine: Engine, value: Any) -> None:
    """Offline callers write them, and clients behind ``--trust-request-mm-kwargs``."""
    from vllm.exceptions import VLLMValidationError

    for name in ("visual_token_method", "visual_token_text", "visual_token_detail"):  # budgets: see above
        prompt = {**engine.prompt(("coffee", None)), "mm_processor_kwargs": {name: value}}
        with pytest.raises(VLLMValidationError, match=rf"^{name} must be .*{re.escape(repr(value))}") as refused:
            engine.generate([prompt], tokens=1)
        assert refused.value.parameter == name


def test_budget_without_images_changes_nothing(engine: Engine) -> None:
    plain = {"prompt": "<s>USER: Hello. ASSISTANT:"}
    budgeted = {**plain, "mm_processor_kwargs": {"visual_token_budget": 64}}
    one, other = engine.generate([plain, budgeted])
    assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_chat_takes_the_budget(engine: Engine) -> None:
    from PIL import Image
    from vllm import SamplingParams

    from promprune_vllm.demo import photo_path

    image = Image.open(photo_path("coffee")).convert("RGB")
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": QUESTION}]
    lengths = [
        len(
            engine.llm.chat(
                [{"role": "user", "content": content}],
                SamplingParams(max_tokens=1),
                use_tqdm=False,
                mm_processor_kwargs=kwargs,
            )[0].prompt_token_ids
        )
        for kwargs in (None, {"visual_token_budget": 100})
    ]
    assert lengths[0] - lengths[1] == VISUAL_TOKENS - 100


def test_image_embeds_pass_through_and_refuse_a_budget(engine: Engine) -> None:
    from vllm.multimodal.parse import ImageEmbeddingItems, MultiModalDataItems

    processor = engine.llm.llm_engine.renderer.get_mm_processor()
    items = MultiModalDataItems({"image": ImageEmbeddingItems([torch.zeros(10, 384)])})
    inputs = SimpleNamespace(
        mm_data_items=items, mm_uuid_items=None, hf_processor_mm_kwargs={}, prompt="", cache=None
    )
    media = processor._media(inputs, Plan())
    plans = processor._plan(inputs, media, PruningRequest(), Plan(), prunes=True)["image"]
    (plan,) = media["image"].final_plans(plans, [10])
    assert (plan.total, plan.kept) == (10, 10)
    asked = PruningRequest(BudgetRequest.parse(4), sent=True)
    with pytest.raises(BudgetError, match="image_embeds"):
        processor._plan(inputs, media, asked, Plan(), prunes=True)
