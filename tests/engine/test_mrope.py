"""M-RoPE families: half precision, videos, embeddings, vLLM's second runner, and what guards the pruning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from promprune_vllm.demo.processing import IMAGE_ID
from promprune_vllm.demo.qwen_processing import VIDEO_ID
from promprune_vllm.engine.compat import versions
from promprune_vllm.engine.worker.encoder_graphs import keep_eager
from tests.clips import Clip
from tests.engine.family_engine import FamilyEngine, picture
from tests.engine.storing import storing

pytestmark = pytest.mark.engine
# Family, and how many of the two modules with hooks vLLM would compile.
COMPILED = {"qwen2_vl": 0, "qwen2_5_vl": 2, "qwen3_vl": 1, "qwen3_5": 1, "glm4v": 0}


@pytest.fixture(scope="module", params=COMPILED)
def half(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[FamilyEngine]:
    """In bfloat16, with the encoder's graphs and compilation on."""
    bypasses = {"cudagraph_mm_encoder": True, "compile_mm_encoder": True}
    engine = FamilyEngine(
        request.param,
        models[request.param],
        dtype="bfloat16",
        max_num_batched_tokens=64,
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 3, "video": 1},
        compilation_config=bypasses,
    )
    yield engine
    engine.close()


def test_positions_beyond_256_are_true_in_bfloat16(half: FamilyEngine) -> None:
    """Integers above 256 are not all numbers of bfloat16: positions must not pass through them as such."""
    before = "x" * 300
    ask = half.ask("portrait", "landscape", budget=21, before=before)
    with half.fed() as fed:
        (output,) = half.generate([ask], tokens=4)
    truth = half.true_positions(output.prompt_token_ids, [("portrait", 21), ("landscape", 21)], later=3)
    assert int(truth.max()) > 600
    assert torch.equal(torch.cat(fed.positions, dim=-1), truth)


def test_graphs_and_compilation_of_the_encoder_stay_on(half: FamilyEngine) -> None:
    """All but the two modules whose hooks capture features are compiled, with a GPU."""
    compilation = half.llm.llm_engine.vllm_config.compilation_config
    assert compilation.cudagraph_mm_encoder
    assert compilation.compile_mm_encoder
    assert half.recomputes_positions()
    assert half.llm.model_config.multimodal_config.video_pruning_rate is None
    block = half.model.visual.blocks[half.model.saliency_block()]
    hooked = [module for module in (block, half.model.visual.merger) if hasattr(module, "do_not_compile")]
    assert len(hooked) == COMPILED[half.family]
    for module in hooked:
        module.do_not_compile = False
    keep_eager((block, half.model.visual.merger))
    assert all(module.do_not_compile for module in hooked)


@pytest.mark.skipif(versions.before("0.30"), reason="the graphs of vLLM 0.29 get pixels that nobody normalized")
def test_the_encoders_graphs_encode_whole_images_and_leave_out_pruned_ones(
    half: FamilyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = [half.ask("square", budget=budget) for budget in (None, 9)]
    half.forget()
    before = [output.outputs[0].token_ids for output in half.generate(asks)]
    graphs = half.give_encoder_graphs(monkeypatch)
    used = []
    for ask, expected in zip(asks, before, strict=True):
        half.forget()
        (output,) = half.generate([ask])
        assert output.outputs[0].token_ids == expected
        used.append(graphs.graph_misses)
    assert used == [1, 1], "the first image, and not the pruned one"


def test_with_the_feature_cache_whole_images_leave_the_encoders_graphs_too(
    half: FamilyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = half.ask("square")
    half.forget()
    (before,) = half.generate([ask])
    graphs = half.give_encoder_graphs(monkeypatch)
    with storing(half) as store:
        (output,) = half.generate([ask])
        assert len(store) == 1
    assert output.outputs[0].token_ids == before.outputs[0].token_ids
    assert graphs.graph_misses == 0


def _video(frames: int = 4) -> tuple[np.ndarray, dict[str, Any]]:
    pixels = np.stack(
        [np.roll(np.asarray(picture("landscape").resize((96, 64))), i, axis=1) for i in range(frames)]
    )
    metadata = {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return pixels, metadata


def test_a_video_beside_a_pruned_image_passes_untouched(half: FamilyEngine) -> None:
    """Rows, positions and positions after it are those it has in a prompt where nothing is pruned."""
    seen: dict[int | None, Any] = {}
    for budget in (None, 11):
        half.forget()
        with half.fed() as fed:
            (output,) = half.generate([_with_video(half, budget)], tokens=3)
        embeds, positions = torch.cat(fed.embeds), torch.cat(fed.positions, dim=-1)
        frames = [i for i, token in enumerate(output.prompt_token_ids) if token in (VIDEO_ID, IMAGE_ID)]
        frames = frames[budget or half.tokens("portrait") :]  # GLM's have the token of images
        after = positions[:, frames[-1] + 1 :]
        assert len(frames) >= 2 * 2 * 3
        seen[budget] = embeds[frames], positions[:, frames], after[:, -5:]
    for full, pruned in zip(*seen.values(), strict=True):
        assert torch.equal(full, pruned)


def _with_video(half: FamilyEngine, budget: int | None) -> dict[str, Any]:
    ask = half.ask("portrait", budget=None if budget is None else [budget, "full"])
    ask["prompt"] += f"{type(half.model).get_placeholder_str('video', 0)}?"
    ask["multi_modal_data"]["video"] = [_video()]
    return ask


@pytest.mark.skipif(versions.before("0.32"), reason="not every older minor measures")
@pytest.mark.parametrize("budget", [None, 11])
def test_rows_for_another_engine_have_the_width_that_is_measured(
    half: FamilyEngine, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where ``--ec-transfer-config`` is set (``test_disaggregation.py``): whole images and videos too."""
    from vllm.distributed.ec_transfer.ec_connector.encoder_output_width import _measure_on_worker

    fed, answers = [], []
    for sends in (False, True):
        monkeypatch.setattr(half.model, "_sends", sends)
        half.forget()
        with half.fed() as seen:
            (output,) = half.generate([_with_video(half, budget)], tokens=3)
        answers.append(output.outputs[0].token_ids)
        fed.append((torch.cat(seen.embeds), torch.cat(seen.positions, dim=-1)))
    (measured,) = half.core.model_executor.collective_rpc(_measure_on_worker)
    assert {rows.shape[1] for rows in half.rows().values()} == {*measured.values()}
    assert answers[0] == answers[1]
    for alone, sent in zip(*fed, strict=True):
        assert torch.equal(alone, sent)


def test_image_embeds_pass_through_and_refuse_a_budget(half: FamilyEngine) -> None:
    from vllm.exceptions import VLLMValidationError

    if not hasattr(half.processor.info.get_data_parser(), "_spatial_merge_size"):
        pytest.skip("vLLM parses no embeddings with a grid for this family")
    rows = half.encoded("square").rows
    grid = half.inputs("square")["image_grid_thw"]
    ask = {**half.ask("square"), "multi_modal_data": {"image": {"image_embeds": rows, "image_grid_thw": grid}}}
    half.forget()
    with half.fed() as fed:
        (output,) = half.generate([ask], tokens=3)
    where = [i for i, token in enumerate(output.prompt_token_ids) if token == IMAGE_ID]
    width = half.llm.model_config.get_hidden_size()
    assert torch.equal(torch.cat(fed.embeds)[where], rows[:, :width])
    truth = half.true_positions(output.prompt_token_ids, [("square", None)], later=2)
    assert torch.equal(torch.cat(fed.positions, dim=-1), truth)
    with pytest.raises(VLLMValidationError, match="image_embeds"):
        half.generate([{**ask, "mm_processor_kwargs": {"visual_token_budget": 5}}], tokens=1)


@pytest.mark.parametrize(("least", "most"), [(64, 256), (4, 16)])
def test_a_budget_is_of_the_tokens_left_by_limits_on_pixels(half: FamilyEngine, least: int, most: int) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(half.llm.model_config.model).image_processor
    token_px = (processor.patch_size * processor.merge_size) ** 2
    limits = {"size": {"shortest_edge": least * token_px, "longest_edge": most * token_px}}
    (grid,) = processor(images=[picture("portrait")], return_tensors="pt", **limits)["image_grid_thw"]
    seen = int(grid.prod()) // processor.merge_size**2
    after = []
    for budget, kept in ((None, seen), (3, 3)):
        half.forget()
        asked = {} if budget is None else {"visual_token_budget": budget}
        prompt = {**half.ask("portrait"), "mm_processor_kwargs": {**limits, **asked}}
        with half.fed() as fed:
            (output,) = half.generate([prompt], tokens=3)
        assert output.prompt_token_ids.count(IMAGE_ID) == kept
        after.append(torch.cat(fed.positions, dim=-1)[:, -8:])
    assert torch.equal(*after), "text goes on behind the whole image"


def test_a_pruned_image_that_ends_the_prompt_is_refused(half: FamilyEngine) -> None:
    from vllm.exceptions import VLLMValidationError

    placeholder = type(half.model).get_placeholder_str("image", 0)
    ends = {**half.ask("landscape"), "prompt": f"Look: {placeholder.removesuffix(half.processor.end_token)}"}
    with half.fed() as fed:
        (output,) = half.generate([ends], tokens=3)
    truth = half.true_positions(output.prompt_token_ids, [("landscape", None)], later=2)
    assert torch.equal(torch.cat(fed.positions, dim=-1), truth), "unpruned, it may"
    with pytest.raises(VLLMValidationError, match="ends the prompt"):
        half.generate([{**ends, "mm_processor_kwargs": {"visual_token_budget": 5}}], tokens=1)


def test_the_second_runner_writes_the_same_positions(half: FamilyEngine) -> None:
    """vLLM's runner for GPUs keeps positions elsewhere; its own class calls our hook, here on fake states."""
    from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

    prompt, features = processed(half, half.ask("portrait", "square", budget=9, before="Look: "))
    positions, delta = half.model.get_mrope_input_positions(prompt, features)
    with torch.inference_mode():
        inputs = half.inputs("portrait", "square")
        counts = torch.tensor([[half.tokens(shape), 9, 0] for shape in ("portrait", "square")])
        embeddings = half.model.embed_multimodal(visual_token_counts=counts, **inputs)
    ropes, written = SimpleNamespace(read_prefill_positions=lambda *_: positions.int()), []
    ropes.update_prefill_positions = lambda _, new, later: written.append((new, later))
    start = features[0].mm_position.offset + 4  # a chunk that begins inside the first image
    batch = SimpleNamespace(
        req_ids=["r"],
        idx_mapping_np=np.array([0]),
        prefill_len_np=np.array([len(prompt)]),
        num_computed_prefill_tokens_np=np.array([start]),
        num_scheduled_tokens=np.array([len(prompt) - start]),
    )
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=torch.tensor([prompt])))
    cache = SimpleNamespace(mm_features={"r": features})
    pruner = MultiModalPruner(half.model, ropes, cache, half.llm.model_config.get_inputs_embeds_size())
    bare = pruner.recompute([embeddings[0][4:], embeddings[1]], batch, states)
    ((new, later),) = written
    truth = half.true_positions(prompt, [("portrait", 9), ("square", 9)], later=1)
    assert torch.equal(new[:, start:], truth[:, start:-1])
    assert len(prompt) + later == int(truth[0, -1])
    assert later == delta
    assert [rows.shape[1] for rows in bare] == [half.model.visual.out_hidden_size] * 2


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "glm4v"])
def test_with_video_pruning_no_budget_is_obeyed(family: str, models: dict[str, Path]) -> None:
    """vLLM's own pruning of videos gets the model as vLLM made it, and a budget is refused with the reason.

    Two of the three have no such pruning: vLLM then ignores the option, and so must we.
    """
    from vllm.exceptions import VLLMValidationError

    engine = FamilyEngine(family, models[family], video_pruning_rate=0.5)
    has_pruning = "supports_multimodal_pruning" in dir(type(engine.model).__bases__[-1])
    assert engine.recomputes_positions() is has_pruning
    for medium in ("square", Clip(7)):
        (output,) = engine.generate([engine.ask(medium)], tokens=1)
        with pytest.raises(VLLMValidationError, match="--video-pruning-rate"):
            engine.generate([engine.ask(medium, budget=5)], tokens=1)
    if family != "glm4v":  # whose videos are made of its images' token
        assert output.prompt_token_ids.count(VIDEO_ID) == (30 if has_pruning else 60), "vLLM drops half of 60"
    engine.close()


def processed(engine: FamilyEngine, ask: dict[str, Any]) -> tuple[list[int], list[Any]]:
    """A prompt as the engine gets it: token ids, and its images with their places."""
    caught: list[Any] = []
    original = engine.model.get_mrope_input_positions

    def catch(input_tokens: list[int], mm_features: list[Any]) -> Any:
        caught.append((list(input_tokens), mm_features))
        return original(input_tokens, mm_features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model, "get_mrope_input_positions", catch)
        engine.forget()
        engine.generate([ask], tokens=1)
    return caught[0]
