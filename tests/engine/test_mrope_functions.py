"""The pure functions of M-RoPE positions; the module they live in imports vLLM."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promprune_vllm.engine.worker.cells import CHANNELS, decode_cells, encode_cells, starts_of_runs, write_cells
from promprune_vllm.engine.worker.unpruned_prompt import Span, unpruned_columns
from tests.waits import NoWaits, to_gpu

pytestmark = pytest.mark.engine
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An image in a prompt: text before it, tokens kept, tokens dropped.
IMAGES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20), st.integers(1, 50)), max_size=5)


@given(IMAGES, st.integers(1, 9))
def test_columns_are_those_of_the_unpruned_prompt(images: list[tuple[int, int, int]], after: int) -> None:
    spans: list[Span] = []
    truth: list[int] = []
    unpruned = 0
    for text, kept, dropped in images:
        truth += range(unpruned, unpruned + text)
        spans.append(Span(offset=len(truth), kept=kept, total=kept + dropped, token=0))
        truth += range(unpruned + text, unpruned + text + kept)  # the first ones stand for those kept
        unpruned += text + kept + dropped
    truth += range(unpruned, unpruned + after)
    columns = unpruned_columns(len(truth), spans)
    assert columns.dtype == torch.int64
    assert columns.tolist() == truth


def test_a_prompt_without_pruned_images_stands_where_it_stands() -> None:
    assert unpruned_columns(5, ()).tolist() == [0, 1, 2, 3, 4]
    assert unpruned_columns(4, [Span(1, 2, 2, 0)]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_and_column_survives_every_precision(dtype: torch.dtype) -> None:
    """All rows and columns up to 1300: far beyond 256, above which bfloat16 holds no odd number."""
    height, width = 1300, 1301
    along = torch.arange(height)
    for cells in (along * width, along, along * width + along, along * width + width - 1):
        rows = torch.randn(len(cells), 6).to(dtype)
        marked = encode_cells(rows, cells // width, cells % width, cells * 97 % 256**3 - 1)
        assert marked.dtype == dtype
        assert marked.shape == (len(cells), 6 + CHANNELS)
        assert torch.equal(marked[:, :6], rows)
        row, column, offset = decode_cells(marked[:, 6:])
        assert row.dtype == column.dtype == torch.int64
        assert torch.equal(row * width + column, cells)
        assert torch.equal(offset, cells * 97 % 256**3 - 1)


@given(st.sampled_from(DTYPES), st.integers(1, 65_535), st.integers(0, 65_535), st.data())
def test_cells_survive_up_to_sixteen_bits(dtype: torch.dtype, width: int, row: int, data: st.DataObject) -> None:
    column = data.draw(st.integers(0, width - 1))
    offset = row * 200 + column % 200  # up to 24 bits
    numbers = [torch.tensor([value]) for value in (row, column, offset)]
    marked = encode_cells(torch.zeros(1, 1, dtype=dtype), *numbers)
    assert [int(value) for value in decode_cells(marked[:, 1:])] == [row, column, offset]


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_of_what_was_not_pruned_decode_to_no_cell(dtype: torch.dtype) -> None:
    row, column, _ = decode_cells(torch.full((3, CHANNELS), -1.0, dtype=dtype))
    assert bool((row < 0).all())
    assert bool((column < 0).all())


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_cells_are_written_where_their_tokens_are(media: list[bool], data: st.DataObject) -> None:
    """A chunk may end within an image, and has no cells for images after it, nor for what was not pruned."""
    media[data.draw(st.integers(0, len(media) - 1))] = True
    numbers = st.tuples(*[st.integers(0, 700)] * 2, st.integers(-1, 700))
    cells = data.draw(st.lists(st.none() | numbers, min_size=1, max_size=sum(media)))
    in_time_only = data.draw(st.booleans())
    nothing = torch.full((1, CHANNELS), -1.0)
    marks = [nothing if at is None else encode_cells(nothing[:, :0], *torch.tensor(at).split(1)) for at in cells]
    positions, starts = torch.randint(0, 1000, (3, len(media))), torch.randint(0, 1000, (len(media),))
    expected, left = positions.clone(), iter(cells)
    for column in range(len(media)):
        if media[column] and (at := next(left, None)) is not None:
            row, across, ahead = at
            start = positions[0, column] if ahead < 0 else starts[column]  # of its own, or of a run
            moved = torch.tensor([1, not in_time_only, not in_time_only]) * max(ahead, 0)
            expected[:, column] = start + moved + torch.tensor([0, row, across])
    arguments = positions, starts, torch.tensor(media), torch.cat(marks)
    assert torch.equal(write_cells(*arguments, in_time_only=in_time_only), expected)
    without_values = to_gpu(arguments)
    with NoWaits():
        assert write_cells(*without_values, in_time_only=in_time_only).shape == positions.shape


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_a_run_starts_behind_the_token_before_it(in_run: list[bool]) -> None:
    time = torch.randint(0, 1000, (len(in_run),))
    expected = []
    for i, is_in in enumerate(in_run):
        before = max((j for j in range(i) if not in_run[j]), default=None)
        behind = 0 if before is None else int(time[before]) + 1
        expected.append(behind if is_in else int(time[i]))
    arguments = time, torch.tensor(in_run)
    assert starts_of_runs(*arguments).tolist() == expected
    without_values = to_gpu(arguments)
    with NoWaits():
        assert starts_of_runs(*without_values).shape == time.shape
