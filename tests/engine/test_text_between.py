"""Text among the rows of a video's frames: in its place whatever the frames keep, with the positions it had."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promprune_vllm import VisionFeatures
from promprune_vllm.core.selection import Selection
from promprune_vllm.engine.keys import FRAME
from promprune_vllm.engine.worker.adapters import without_adapters, wrapped_embeddings
from promprune_vllm.engine.worker.encoded_image import EncodedImage, PruneJob
from promprune_vllm.engine.worker.selected_tokens import SelectedTokens
from promprune_vllm.engine.worker.text_between import with_text_between
from tests.waits import NoWaits, to_gpu

pytestmark = pytest.mark.engine
SIDES = st.integers(1, 5)
TEXTS = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=4)
WIDTH, COLUMNS = 3, 2  # of the model, and those that a tower appends


def embed(tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([tokens, tokens + 100, tokens + 200], dim=1).float()


def video(frames: int, height: int, width: int) -> EncodedImage:
    tokens = frames * height * width
    rows = torch.randn(tokens, WIDTH + COLUMNS)
    return EncodedImage.of_frames(rows, VisionFeatures(projected=rows[:, :WIDTH], grid=(frames, height, width)))


@given(SIDES, SIDES, TEXTS, st.data())
def test_kept_rows_and_text_are_those_of_the_whole_video_in_order(
    height: int, width: int, texts: list[list[int]], data: st.DataObject
) -> None:
    clip = video(len(texts) + 1, height, width)
    layout = [FRAME, *(entry for text in texts for entry in (*text, FRAME))]
    kept = sorted(data.draw(st.sets(st.integers(0, len(clip.rows) - 1), min_size=1)))

    rows, cells, position, token = [], [], 0, 0  # of all that stays, one after the other
    for entry in layout:
        if entry == FRAME:
            for cell in range(height * width):
                if token in kept:
                    rows.append(clip.rows[token])
                    cells.append((cell // width, cell % width, position))
                token += 1
            position += max(height, width)
        else:
            rows.append(torch.cat([embed(torch.tensor([entry]))[0], torch.zeros(COLUMNS)]))
            cells.append((0, 0, position))
            position += 1

    found = with_text_between(clip, layout, embed)
    (group,) = found.joined().groups
    chosen = SelectedTokens(found.rows, [(group, Selection(torch.tensor(kept)))], found.newlines, found.between)
    given_rows, places = chosen.rows(lambda each: each)
    assert torch.equal(given_rows, torch.stack(rows))
    assert torch.equal(torch.stack(found.cells(places), dim=1), torch.tensor(cells))
    job = PruneJob(len(clip.rows), len(kept), None, layout=layout)  # type: ignore[arg-type]
    assert job.rows == len(rows)
    assert clip.between is None


def test_a_layout_of_another_video_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the video has 3 frames, and its layout 2"):
        with_text_between(video(3, 2, 2), [FRAME, 7, FRAME], embed)


def test_the_host_does_not_wait_for_its_places() -> None:
    rows = to_gpu(torch.zeros(24, WIDTH + COLUMNS))
    kept = to_gpu(torch.arange(5))
    with NoWaits():
        clip = EncodedImage.of_frames(rows, VisionFeatures(projected=rows[:, :WIDTH], grid=(2, 3, 4)))
        found = with_text_between(clip, [FRAME, 7, 8, FRAME], lambda ids: rows.new_empty((len(ids), WIDTH)))
        (group,) = found.joined().groups
        chosen = SelectedTokens(found.rows, [(group, Selection(kept))], found.newlines, found.between)
        all_rows, places = chosen.rows(lambda each: each)
        assert len(all_rows) == 5 + 2
        assert [len(each) for each in found.cells(places)] == [7, 7, 7]


def test_an_adapter_does_not_apply_to_tokens_that_are_not_of_the_step() -> None:
    """With vLLM's own wrapper, around torch's embedding, in a step of two tokens with the second adapter."""
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

    inside, linear = torch.nn.Embedding(8, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
    wrapper = VocabParallelEmbeddingWithLoRA(inside)
    wrapper.lora_a_stacked_2d = torch.ones(2 * 8, 1)
    wrapper.punica_wrapper = SimpleNamespace(_embeddings_indices=torch.tensor([8, 8]))
    model = torch.nn.ModuleList([linear, wrapper, torch.nn.Embedding(8, WIDTH)])
    tokens = torch.tensor([7, 1, 7])
    assert wrapped_embeddings(model) == [wrapper]
    with without_adapters([wrapper]):
        assert torch.equal(wrapper(tokens), inside(tokens))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="size"):
            wrapper(tokens)  # it takes them for the tokens of the step
        with pytest.raises(ZeroDivisionError), without_adapters([wrapper]):
            raise ZeroDivisionError
    assert wrapped_embeddings(torch.nn.ModuleList([linear, inside])) == []
