"""Budgets are integers, exact, and refused with the value and the limits."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promprune_vllm import Budget, BudgetPolicy
from promprune_vllm.core.budget import MAX_BUDGET_TOKENS
from promprune_vllm.errors import BudgetError

totals = st.integers(1, 20_000)
budgets = st.one_of(
    st.builds(lambda n: Budget(tokens=n), st.integers(1, MAX_BUDGET_TOKENS)),
    st.builds(lambda f: Budget(share=f), st.fractions(Fraction(1, 10_000), 1)),
)


BAD = [0, -3, 10**12, 10**5000, 1e12, 64.5, 64.0, "64", "abc", True, {}, [], b"1", "x" * 10_000]


@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
def test_parse_refuses_with_value_and_limits(value: object) -> None:
    with pytest.raises(BudgetError) as refused:
        Budget.parse(value)
    message = str(refused.value)
    assert refused.value.param == "visual_token_budget"
    assert "visual_token_budget must be" in message
    assert str(MAX_BUDGET_TOKENS) in message
    assert "leave the field out" in message
    assert len(message) < 400


@pytest.mark.parametrize("value", [1, 64, MAX_BUDGET_TOKENS])
def test_parse_takes_integers(value: int) -> None:
    assert Budget.parse(value) == Budget(tokens=value)


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
