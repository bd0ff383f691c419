"""Positions of pruned prompts against the table they are looked up in."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from promprune_vllm.core.budget import IMAGE, Budget, BudgetRequest
from promprune_vllm.core.policy import BudgetPolicy, MediaPolicy, Medium
from promprune_vllm.core.positions import require_rows, table_rows
from promprune_vllm.errors import BudgetError


@dataclass(frozen=True)
class Image:
    """Text in front of it, and the rows and columns of its tokens."""

    text: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


IMAGES = st.lists(
    st.builds(Image, st.integers(0, 40), st.integers(1, 130), st.integers(1, 130)), min_size=1, max_size=12
)
BUDGETS = st.one_of(
    st.none(),
    st.integers(1, 400).map(lambda tokens: Budget(tokens=tokens)),
    st.fractions(Fraction(1, 1000), 1).map(lambda share: Budget(share=share)),
)
DECODED = st.one_of(st.just(0), st.integers(1, 6000))


def asks(images: int) -> st.SearchStrategy[BudgetRequest]:
    each = st.lists(BUDGETS, min_size=images, max_size=images).map(
        lambda budgets: BudgetRequest(each=tuple(budgets))
    )
    return st.one_of(
        BUDGETS.map(lambda budget: BudgetRequest(each=budget)), each, st.integers(images, 9000).map(_in_total)
    )


def _in_total(tokens: int) -> BudgetRequest:
    return BudgetRequest(total=tokens)


def last_position(images: list[Image], kept: list[int], after: int, length: int) -> int:
    """The largest position of a prompt and of what is generated until it has ``length`` tokens, by definition.

    Text advances by one. An image's cells have its rows and columns, counted from where it starts; what follows
    starts behind its longer side. Which cells it keeps is left open, so the farthest may be among them.
    """
    start, tokens, largest = 0, 0, -1
    for image, keep in zip(images, kept, strict=True):
        start, tokens = start + image.text, tokens + image.text
        largest = start + max(image.rows, image.columns) - 1
        start, tokens = largest + 1, tokens + keep
    start, tokens = start + after, tokens + after
    assert tokens <= length, "vLLM refuses longer prompts"
    return max(largest, start + (length - tokens) - 1)


def refused(images: list[Image], kept: list[int], length: int) -> bool:
    try:
        require_rows(
            [(max(image.rows, image.columns), keep) for image, keep in zip(images, kept, strict=True)], length
        )
    except BudgetError:
        return True
    return False


@given(IMAGES, st.integers(1, 30), DECODED, BUDGETS, st.data())
def test_a_prompt_is_refused_or_every_position_is_in_the_table(
    images: list[Image], after: int, decoded: int, default: Budget | None, data: st.DataObject
) -> None:
    """Whatever was asked for: tokens, shares, a list, a total, or nothing where the server has a default."""
    ask = data.draw(asks(len(images)))
    level = data.draw(st.sampled_from([Fraction(1), Fraction(1, 2), Fraction(1, 20)]))
    media = [Medium(IMAGE, image.tokens, level) for image in images]
    kept = list(MediaPolicy(BudgetPolicy(default)).resolve_all(ask, media))
    length = sum(image.text for image in images) + sum(kept) + after + decoded
    last = last_position(images, kept, after, length)
    assert refused(images, kept, length) == (last >= table_rows(length))


@given(IMAGES, st.integers(1, 30), DECODED, st.data())
def test_what_fits_without_pruning_is_never_refused(
    images: list[Image], after: int, decoded: int, data: st.DataObject
) -> None:
    """So a server's own default, or a client's budget, takes no request away that vLLM would serve."""
    length = sum(image.text + image.tokens for image in images) + after + decoded
    kept = [data.draw(st.integers(1, image.tokens)) for image in images]
    assert last_position(images, kept, after, length) < table_rows(length)
    assert not refused(images, kept, length)


@given(IMAGES, st.integers(1, 6000))
@example([Image(0, 1, 130)] * 40, 1)
def test_images_that_keep_every_token_are_never_refused(images: list[Image], length: int) -> None:
    assert not refused(images, [image.tokens for image in images], length)


def test_a_refusal_says_the_positions_the_limit_and_the_next_step() -> None:
    long = [(64, 1)] * 150
    require_rows(long, 4096)  # 13,546 of 16,384
    with pytest.raises(BudgetError) as error:
        require_rows(long, 2048)
    assert error.value.reason == "limits"
    assert str(error.value) == (
        "visual_token_budget keeps 150 tokens of 150 images or videos that still use 9600 positions: with "
        "--max-model-len 2048 the positions could reach 11498, and the limit is 8192 (4 per token). Keep "
        "more tokens of each, or send fewer or smaller ones."
    )


def test_the_last_row_of_the_table_is_used_and_none_behind_it() -> None:
    """A context of 100 tokens: one of an image's, whose positions and the 99 of text end with the table's."""
    assert last_position([Image(0, 301, 1)], [1], 99, 100) == table_rows(100) - 1
    require_rows([(301, 1)], 100)
    with pytest.raises(BudgetError, match="could reach 401, and the limit is 400"):
        require_rows([(302, 1)], 100)


def test_a_prompt_without_images_is_never_refused() -> None:
    require_rows([], 1)
