"""Budgets are integers, exact, and refused with the value and the limits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promprune_vllm import Budget, BudgetPolicy
from promprune_vllm.core.budget import IMAGE, MAX_BUDGET_TOKENS, BudgetRequest
from promprune_vllm.core.policy import MediaPolicy, Medium
from promprune_vllm.errors import BudgetError

ONE = Fraction(1)
totals = st.integers(1, 20_000)
budgets = st.one_of(
    st.builds(lambda n: Budget(tokens=n), st.integers(1, MAX_BUDGET_TOKENS)),
    st.builds(lambda f: Budget(share=f), st.fractions(Fraction(1, 10_000), 1)),
)


# What a client may send, and what of 576 and of 100 tokens it keeps (default 200, low 64).
GOOD: list[tuple[object, tuple[int, int]]] = [
    (1, (1, 1)),
    (64, (64, 64)),
    (MAX_BUDGET_TOKENS, (576, 100)),
    (64.0, (64, 64)),
    (1.0, (1, 1)),
    ("64", (64, 64)),
    ("64.0", (64, 64)),
    ("0.25", (144, 25)),
    ({"total": 338.0}, (288, 50)),
    ({"total": "338"}, (288, 50)),
    (0.25, (144, 25)),
    (0.001, (1, 1)),
    (0.999999, (576, 100)),
    ("25%", (144, 25)),
    ("12.5%", (72, 13)),
    ("100%", (576, 100)),
    ("full", (576, 100)),
    ("auto", (200, 100)),
    ([64, "full"], (64, 100)),
    (["10%", "auto"], (58, 100)),
    ((1, 2), (1, 2)),
    ({"total": 2}, (1, 1)),
    ({"total": 338}, (288, 50)),
    ({"total": 5000}, (576, 100)),
]
BAD: list[object] = [
    *(0, -3, 10**12, 10**5000, 1e12, 64.5, 0.0, -0.5, float("nan"), float("inf"), True, False, None),
    *("064", "1e2", "6_4", " 64", "+64", "64.5", "0", "0.0", ".5", "1000001", "9" * 5000, "\uff16\uff14"),
    *("abc", "", "FULL", "0%", "101%", "-5%", "25 %", "1e2%", "%", "\u0662%", "x" * 10_000, b"1"),
    *(
        {},
        {"total": 0},
        {"total": True},
        {"total": 1.5},
        {"total": "x"},
        {"total": None},
        {"total": 64, "x": 1},
        {"tokens": 64},
        {"per_frame": 0},
        {"per_frame": 1.5},
        {"per_frame": 1_000_001},
        {"per_frame": 8, "total": 8},
    ),
    *([], [0], [64, "x"], [[64]], [None], [{"total": 64}], [{"per_frame": 0}], [10**5000], [1] * 1025),
]


@pytest.mark.parametrize(("value", "kept"), GOOD, ids=[str(value) for value, _ in GOOD])
def test_every_form_keeps_what_it_says(value: object, kept: tuple[int, int]) -> None:
    policy = MediaPolicy(images=BudgetPolicy(default=Budget(tokens=200)))
    assert policy.resolve_all(BudgetRequest.parse(value), _images(576, 100)) == kept


def _images(*sizes: int) -> list[Medium]:
    return [Medium(IMAGE, size) for size in sizes]


@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
def test_every_bad_form_is_refused_with_value_and_limits(value: object) -> None:
    with pytest.raises(BudgetError) as refused:
        BudgetRequest.parse(value)
    message = str(refused.value)
    assert refused.value.param == "visual_token_budget"
    assert re.search(r"visual_token_budget(\[\d\])? must be", message)
    assert str(MAX_BUDGET_TOKENS) in message
    assert "omit the field" in message
    assert len(message) < 600


values = st.one_of(
    st.integers(1, MAX_BUDGET_TOKENS),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.decimals(0, 100, places=3).filter(lambda d: d > 0).map(lambda d: f"{d}%"),
    st.sampled_from(["full", "auto"]),
)
asks = st.one_of(
    values, st.lists(values, min_size=1, max_size=5), st.integers(1, MAX_BUDGET_TOKENS).map(lambda n: {"total": n})
)


@given(asks)
def test_what_is_printed_is_read_as_the_same(value: object) -> None:
    ask = BudgetRequest.parse(value)
    assert BudgetRequest.parse(ask.printed()) == ask
    assert BudgetRequest.parse(json.loads(json.dumps(ask.printed()))) == ask


@given(asks, st.lists(totals, min_size=1, max_size=5))
def test_every_image_keeps_at_least_one_and_at_most_all(value: object, sizes: list[int]) -> None:
    ask = BudgetRequest.parse(value)
    try:
        kept = MediaPolicy().resolve_all(ask, _images(*sizes))
    except BudgetError:
        assert (isinstance(value, list) and len(value) != len(sizes)) or (ask.total or len(sizes)) < len(sizes)
        return
    assert all(1 <= keep <= size for keep, size in zip(kept, sizes, strict=True))
    if ask.total is not None:
        assert sum(kept) == min(ask.total, sum(sizes))


@given(st.lists(totals, min_size=1, max_size=5), st.integers(5, 9000), st.integers(0, 50))
def test_a_larger_total_never_keeps_fewer(sizes: list[int], total: int, more: int) -> None:
    def kept(tokens: int) -> tuple[int, ...]:
        return MediaPolicy().resolve_all(BudgetRequest(total=tokens), _images(*sizes))

    few, many = kept(total), kept(total + more)
    assert sum(few) <= sum(many)
    # By largest remainder an image may lose the one token that rounding gave it.
    assert all(after >= before - 1 for before, after in zip(few, many, strict=True))


@given(values, values, totals)
def test_what_asks_for_more_keeps_no_less(one: object, other: object, total: int) -> None:
    policy = BudgetPolicy(default=Budget(tokens=100))
    kept = [policy.resolve(Budget.parse(value), total) for value in (one, other)]
    if isinstance(one, int) and isinstance(other, int):
        assert (kept[0] <= kept[1]) or one > other
    if isinstance(one, float) and isinstance(other, float):
        assert (kept[0] <= kept[1]) or one > other


@pytest.mark.parametrize(("value", "images"), [([64], 2), ([64, 64], 1), ([64], 0), ({"total": 2}, 3)])
def test_an_ask_that_does_not_fit_the_images_is_refused(value: object, images: int) -> None:
    with pytest.raises(BudgetError, match="image"):
        BudgetRequest.parse(value).check_media([IMAGE] * images)


def test_a_value_too_deep_to_print_is_refused_like_any_other() -> None:
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(BudgetError, match="got a list"):
        BudgetRequest.parse(deep)


def test_limits_clamp_or_refuse() -> None:
    clamping = BudgetPolicy(minimum=10, maximum=50)
    assert [clamping.resolve(Budget(tokens=n), 100) for n in (1, 10, 30, 99)] == [10, 10, 30, 50]
    assert clamping.resolve(None, 100) == 50
    assert clamping.resolve(Budget(tokens=1), 5) == 5, "an image with fewer tokens keeps them all"
    refusing = BudgetPolicy(minimum=10, maximum=50, out_of_range="refuse")
    assert refusing.resolve(Budget(tokens=30), 100) == 30
    assert refusing.resolve(None, 100) == 50, "what nobody asked for is not refused"
    assert refusing.resolve(Budget(tokens=60), 40) == 40, "it asks for all of a small image"
    for wrong in (Budget(tokens=5), Budget(tokens=60), Budget(share=Fraction(1))):
        with pytest.raises(BudgetError, match="allows 10 to 50 tokens per image"):
            refusing.resolve(wrong, 100)


def test_a_level_lowers_the_default_down_to_the_floor_and_nothing_else() -> None:
    policy = BudgetPolicy(default=Budget(tokens=200), floor=60)
    half, eighth = Fraction(1, 2), Fraction(1, 8)
    assert [policy.resolve(None, 576, level) for level in (ONE, half, eighth)] == [200, 100, 60]
    assert policy.resolve(None, 40, eighth) == 40
    assert policy.resolve(Budget(tokens=150), 576, eighth) == 150


def test_a_budget_is_tokens_or_a_share() -> None:
    for wrong in ({}, {"tokens": 1, "share": Fraction(1)}, {"share": Fraction(0)}, {"share": Fraction(3, 2)}):
        with pytest.raises(BudgetError):
            Budget(**wrong)  # type: ignore[arg-type]


@given(budgets, totals)
def test_resolve_stays_within_the_image(budget: Budget, total: int) -> None:
    assert 1 <= BudgetPolicy().resolve(budget, total) <= total


@given(st.integers(1, 5000), st.integers(1, 5000), totals)
def test_resolve_is_monotone_and_exact(a: int, b: int, total: int) -> None:
    low, high = sorted((a, b))
    policy = BudgetPolicy()
    assert policy.resolve(Budget(tokens=low), total) <= policy.resolve(Budget(tokens=high), total)
    assert policy.resolve(Budget(tokens=low), total) == min(low, total)


def test_nothing_asked_keeps_everything_or_the_default() -> None:
    assert BudgetPolicy().resolve(None, 576) == 576
    assert BudgetPolicy(default=Budget(tokens=64)).resolve(None, 576) == 64
    assert BudgetPolicy(default=Budget(share=Fraction(1, 4))).resolve(None, 577) == 145  # rounded up


@given(budgets, totals, st.integers(1, 300), st.integers(300, 900))
def test_limits_hold(budget: Budget, total: int, minimum: int, maximum: int) -> None:
    keep = BudgetPolicy(minimum=minimum, maximum=maximum).resolve(budget, total)
    assert min(minimum, total) <= keep <= min(maximum, total)


def test_contradicting_limits_are_refused() -> None:
    for wrong in ({"minimum": 0}, {"minimum": 9, "maximum": 8}):
        with pytest.raises(BudgetError):
            BudgetPolicy(**wrong)
    with pytest.raises(BudgetError):
        BudgetPolicy().resolve(None, 0)


@given(st.lists(st.integers(0, 3000), max_size=12), st.data())
def test_allocation_sums_exactly_and_is_proportional(sizes: list[int], data: st.DataObject) -> None:
    total = sum(sizes)
    keep = data.draw(st.integers(0, total))
    counts = BudgetPolicy().allocate(keep, sizes)
    assert sum(counts) == keep
    for count, size in zip(counts, sizes, strict=True):
        assert 0 <= count <= size
        assert abs(count - keep * size / max(total, 1)) < 1


def test_allocation_gives_ties_to_the_earlier_group() -> None:
    assert BudgetPolicy().allocate(1, [5, 5, 5]) == (1, 0, 0)
    assert BudgetPolicy().allocate(320, [576] * 5) == (64,) * 5
    with pytest.raises(BudgetError):
        BudgetPolicy().allocate(4, [1, 2])


def test_bytes_that_coverage_finds_are_refused_or_obeyed() -> None:
    pytest.importorskip("atheris", reason="no wheel of atheris for this Python")
    target = Path(__file__).parents[1] / "fuzz" / "budget.py"
    call = [sys.executable, str(target), "-runs=100000", "-max_len=200", "-seed=20261121", "-rss_limit_mb=4096"]
    run = subprocess.run(call, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Done 100000 runs" in run.stderr


@given(ask=st.one_of(budgets, st.none()), total=totals)
def test_a_minimum_above_every_image_leaves_only_all_of_its_tokens(ask: Budget | None, total: int) -> None:
    refusing, clamping = (BudgetPolicy(minimum=1_000_000, out_of_range=way) for way in ("refuse", "clamp"))
    assert clamping.resolve(ask, total) == total
    if ask is None or ask.of(total) >= total:
        assert refusing.resolve(ask, total) == total
    else:
        with pytest.raises(BudgetError, match="allows 1000000 or more tokens"):
            refusing.resolve(ask, total)


@given(ask=st.one_of(budgets, st.none()), total=totals)
def test_equal_limits_leave_no_choice(ask: Budget | None, total: int) -> None:
    refusing, clamping = (BudgetPolicy(minimum=64, maximum=64, out_of_range=way) for way in ("refuse", "clamp"))
    kept = min(64, total)
    assert clamping.resolve(ask, total) == kept
    if ask is None or min(ask.of(total), total) == kept:
        assert refusing.resolve(ask, total) == kept
    else:
        with pytest.raises(BudgetError, match="allows 64 to 64 tokens"):
            refusing.resolve(ask, total)
