"""Placeholders of every form that vLLM's processors make, shortened to what an image keeps."""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import PlaceholderRange
from vllm.multimodal.processing import PromptInsertion, PromptReplacement, PromptUpdateDetails

from promprune_vllm import VisionFeatures, get_method
from promprune_vllm.core.budget import VIDEO
from promprune_vllm.engine.api_server import placeholders, rendered_features
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan
from promprune_vllm.engine.keys import COUNTS, FRAME, LAYOUT, field_of
from promprune_vllm.engine.worker.encoded_image import EncodedImage, Group
from promprune_vllm.engine.worker.selected_tokens import select_tokens
from promprune_vllm.errors import BudgetError

pytestmark = pytest.mark.engine
TEXT, VISUAL = 7, 3
# Tiles with separators between them, as Llama 4 and SmolVLM have: text, a run, text, a run, text.
TILED = [TEXT, *[VISUAL] * 6, TEXT, TEXT, *[VISUAL] * 3, TEXT]
LAYOUTS = st.lists(st.booleans(), min_size=1, max_size=40).filter(any)


def fields(plan: ImagePlan) -> dict[str, Any]:
    """An image's or a video's fields, as our processor makes them before the placeholder is known."""
    counts = torch.tensor([plan.total, plan.kept, plan.method])
    values = {COUNTS: counts, LAYOUT: torch.empty(0, dtype=torch.int64)}
    return {field_of(plan.kind, name): SimpleNamespace(data=value) for name, value in values.items()}


def shortened(content: Any, plan: ImagePlan, update: Any = PromptReplacement) -> Any:
    """What vLLM gets from our update for an image, as token ids and a mask."""
    name = "replacement" if update is PromptReplacement else "insertion"
    ours = placeholders.shorten(
        update(modality="image", target=[VISUAL], **{name: content}), [plan], [fields(plan)]
    )
    found = ours.content(0)
    if isinstance(found, list):
        return found, None
    return found.full, found.is_embed(found.full).tolist()


def test_a_plain_list_is_cut() -> None:
    assert shortened(lambda _: [VISUAL] * 9, ImagePlan(9, 4)) == ([VISUAL] * 4, None)


def test_content_may_be_the_same_for_all_images_and_an_insertion() -> None:
    for update in (PromptReplacement, PromptInsertion):
        assert shortened([VISUAL] * 9, ImagePlan(9, 4), update) == ([VISUAL] * 4, None)
        details = PromptUpdateDetails.from_seq([VISUAL] * 9)
        assert shortened(details, ImagePlan(9, 4), update) == ([VISUAL] * 4, None)


@pytest.mark.parametrize(
    "made", [[VISUAL] * 7, PromptUpdateDetails.select_token_id([TEXT, *[VISUAL] * 7], VISUAL)]
)
def test_what_an_unpruned_image_is_said_to_have_is_what_vllm_made_of_it(made: Any) -> None:
    """Before a processor cache takes the fields: one in shared memory gives nothing back that could be changed."""
    said = fields(ImagePlan(9, 9, 2))
    update = PromptReplacement(modality="image", target=[VISUAL], replacement=made)
    assert placeholders.shorten(update, [ImagePlan(9, 9, 2)], [said]).content(0) is made
    assert said[COUNTS].data.tolist() == [7, 7, 2]


def test_text_between_frames_is_one_run_with_them_if_a_method_decides_what_they_keep() -> None:
    """The ids of the text go to the worker: no cache of processed prompts may lose them."""
    plan = ImagePlan(9, 4, kind=VIDEO, between=2)
    details = PromptUpdateDetails.select_token_id(TILED, VISUAL)
    update = PromptReplacement(modality="video", target=[VISUAL], replacement=details)
    assert placeholders.text_between(update, 0) == 2
    said = fields(plan)
    found = placeholders.shorten(update, [plan], [said]).content(0)
    assert found.full == [TEXT, *[VISUAL] * 6, TEXT]
    assert found.is_embed(found.full).tolist() == [False, *[True] * 6, False]
    assert said[field_of(VIDEO, LAYOUT)].data.tolist() == [FRAME, TEXT, TEXT, FRAME]
    assert said[field_of(VIDEO, COUNTS)].data.tolist() == [9, 4, 0]
    run = PromptReplacement(modality="video", target=[VISUAL], replacement=[VISUAL] * 9)
    assert placeholders.text_between(run, 0) == 0


def test_text_stays_and_runs_share_the_budget() -> None:
    for keep, first, second in ((9, 6, 3), (6, 4, 2), (2, 1, 1), (1, 1, 0)):
        details = PromptUpdateDetails.select_token_id(TILED, VISUAL)
        tokens, mask = shortened(lambda _, found=details: found, ImagePlan(9, keep))
        assert tokens == [TEXT, *[VISUAL] * first, TEXT, TEXT, *[VISUAL] * second, TEXT]
        assert mask == [token == VISUAL for token in tokens]


def test_which_tokens_are_visual_is_said_by_the_mask_and_not_by_their_ids() -> None:
    """Some models put embeddings in the place of tokens that stand in text as well."""
    mask = torch.tensor([False, True, True, False])
    details = PromptUpdateDetails(full=[VISUAL] * 4, is_embed=lambda _: mask)
    assert shortened(details, ImagePlan(2, 1)) == ([VISUAL] * 3, [False, True, False])


def test_an_image_that_was_counted_wrong_is_pruned_by_no_budget_and_served_without() -> None:
    """An option of the processor may change images in a way that a family does not count."""
    details = PromptUpdateDetails.select_token_id(TILED, VISUAL)
    with pytest.raises(BudgetError, match="vLLM made 9 tokens of, and which was counted as 8"):
        shortened(details, ImagePlan(8, 4))
    assert shortened(details, ImagePlan(8, 8))[0] == TILED


def test_features_are_refused_if_it_is_unknown_which_tokens_are_visual() -> None:
    """A render server sends no masks, and the engine would end for a row too few."""
    tokens = [1, *[VISUAL] * 4, 2, *TILED]
    plain, tiled = (1, 4), (6, len(TILED))
    mask = torch.tensor(TILED) == VISUAL
    for places, masks in (([plain], [None]), ([plain, tiled], [None, mask])):
        ranges = [PlaceholderRange(*place, is_embed=each) for place, each in zip(places, masks, strict=True)]
        rendered_features.refuse_text_among(ranges, tokens)
    with pytest.raises(BudgetError, match="content_parts"):
        rendered_features.refuse_text_among([PlaceholderRange(*plain), PlaceholderRange(*tiled)], tokens)


@given(LAYOUTS, st.data())
def test_every_layout_keeps_its_text_and_the_budget(layout: list[bool], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, sum(layout)))
    stays = placeholders.kept_tokens(layout, keep)
    assert all(stay for visual, stay in zip(layout, stays, strict=True) if not visual)
    assert sum(stay for visual, stay in zip(layout, stays, strict=True) if visual) == keep


@given(LAYOUTS, st.data())
def test_a_run_has_as_many_tokens_as_the_worker_keeps_of_its_group(
    layout: list[bool], data: st.DataObject
) -> None:
    """Runs are counted in the API server and groups in the worker, both from sizes alone."""
    keep = data.draw(st.integers(1, sum(layout)))
    stays = placeholders.kept_tokens(layout, keep)
    runs, groups, at, row = [], [], 0, 0
    for visual, run in groupby(layout):
        size = len(list(run))
        if visual:
            runs.append(sum(stays[at : at + size]))
            features = VisionFeatures(projected=torch.randn(size, 2), grid=(1, 1, size))
            groups.append(Group(features, torch.arange(row, row + size)))
            row += size
        at += size
    image = EncodedImage(torch.randn(row, 2), groups, torch.empty(0, dtype=torch.int64))
    _, positions = select_tokens(image, keep, get_method("uniform")).rows(lambda rows: rows)
    of_groups = [int(torch.isin(positions, group.positions).sum()) for group in groups]
    assert of_groups == runs


def test_vllm_finds_the_shorter_placeholder() -> None:
    """Its own search in the prompt, with the mask that it makes of ours."""
    from vllm.multimodal.processing.processor import find_mm_placeholders

    update = placeholders.shorten(
        PromptReplacement(
            modality="image",
            target=[VISUAL],
            replacement=lambda _: PromptUpdateDetails.select_token_id(TILED, VISUAL),
        ),
        [ImagePlan(9, 6)],
        [fields(ImagePlan(9, 6))],
    )
    prompt = [1, 2, *update.content(0).full, 5]
    (found,) = find_mm_placeholders(prompt, {"image": [[update.resolve(0)]]})["image"]
    place: PlaceholderRange = found.to_range()
    assert (place.offset, place.length, place.get_num_embeds()) == (2, 10, 6)
    assert place.extract_embeds_range() == [(3, 6), (9, 10)]
