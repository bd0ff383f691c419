"""What an audit finds, and which answers may wait for one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promprune_vllm.config import Settings
from promprune_vllm.core.audit import KEPT, AuditQueue, Scored, compare, kept_class, parse_share
from promprune_vllm.errors import BudgetError, SettingsError
from promprune_vllm.metrics import metric

FIRST, LATER = Scored(-0.1, True), Scored(-2.0, False)
SCORES = st.builds(Scored, st.floats(-1000, 0), st.booleans())


def drawn(weights: Sequence[float], rng: random.Random) -> int:
    return rng.choices(range(len(weights)), weights)[0]


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("100%", 1), ("0.5%", 0.005)])
def test_a_share_is_a_percentage(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["1", "0.01", "0%", "101%", "-1%", "%", " 1%", "1 %", "nan%", "1e3%", "all", ""])
def test_what_is_no_percentage_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with pytest.raises(BudgetError, match="above 0% and at most 100%, got"):
        parse_share(text)
    monkeypatch.setenv("PROMPRUNE_AUDIT", text)
    with pytest.raises(SettingsError, match=r"PROMPRUNE_AUDIT cannot be honored: .*\"1%\""):
        Settings.from_environment()


def test_nothing_is_audited_by_default() -> None:
    assert Settings().audited_share() == 0


@pytest.mark.parametrize(
    ("kept", "name"),
    [(1, "12.5%"), (72, "12.5%"), (73, "25%"), (144, "25%"), (145, "50%"), (288, "50%"), (289, "100%")],
)
def test_the_class_of_a_budget_is_the_smallest_that_holds_it(kept: int, name: str) -> None:
    assert kept_class(kept, 576) == name


def test_the_label_has_every_class() -> None:
    assert tuple(KEPT) == metric.KEPT


def test_a_greedy_token_agrees_if_it_is_first_again() -> None:
    found = compare([FIRST] * 4, [FIRST, Scored(-0.3, True), LATER, FIRST], greedy=True)
    assert (found.tokens, found.agreeing, found.whole) == (4, 3, 0)
    assert found.nats == pytest.approx((0.2 + 1.9) / 4)
    assert compare([FIRST], [Scored(-0.3, True)], greedy=True).whole == 1


def test_what_a_rule_chose_is_compared_by_its_probability() -> None:
    """The model would have said something else, so that its rank tells nothing."""
    forced, again = Scored(math.log(0.1), False), Scored(math.log(0.05), False)
    assert compare([forced], [again], greedy=True).agreeing == pytest.approx(0.5)
    assert compare([again], [forced], greedy=True).agreeing == 1


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1), st.booleans())
def test_agreement_is_a_share_and_cost_is_none_below_zero(
    pairs: list[tuple[Scored, Scored]], greedy: bool
) -> None:
    served, audited = zip(*pairs, strict=True)
    found = compare(served, audited, greedy=greedy)
    assert 0 <= found.whole <= 1
    assert 0 <= found.agreeing <= found.tokens == len(pairs)
    assert 0 <= found.nats <= 100
    same = compare(served, served, greedy=greedy)
    assert (same.agreeing, same.whole, same.nats) == (len(pairs), 1, 0)


def test_impossible_tokens_are_no_endless_cost() -> None:
    never = Scored(-math.inf, False)
    assert compare([FIRST], [never], greedy=True).nats == pytest.approx(99.9)
    assert compare([never], [never], greedy=False).agreeing == 1


def test_sampled_tokens_agree_as_often_as_two_distributions_overlap() -> None:
    """Expected over what is drawn with the kept tokens: 1 minus the total variation distance."""
    rng, kept, every = random.Random(5), (0.6, 0.3, 0.1), (0.3, 0.3, 0.4)
    answer = [drawn(kept, rng) for _ in range(20_000)]
    served, audited = ([Scored(math.log(p[token]), token == 0) for token in answer] for p in (kept, every))
    overlap = sum(map(min, kept, every))
    assert compare(served, audited, greedy=False).agreeing / len(answer) == pytest.approx(overlap, abs=0.01)
    divergence = sum(p * math.log(p / q) for p, q in zip(kept, every, strict=True))
    assert compare(served, audited, greedy=False).nats == pytest.approx(divergence, abs=0.02)


def test_the_queue_is_first_in_first_out_and_full_at_its_limit() -> None:
    queue: AuditQueue[str] = AuditQueue(most_waiting=2)
    assert [queue.push(each) for each in "abc"] == [True, True, False]
    assert [queue.pop() for _ in range(3)] == ["a", "b", None]
    assert queue.push("d")
    assert len(queue) == 1


@given(st.lists(st.integers(0, 60), max_size=50), st.randoms(use_true_random=False))
def test_no_more_bytes_are_held_than_allowed(sizes: list[int], rng: random.Random) -> None:
    queue: AuditQueue[int] = AuditQueue(most_bytes=100)
    held: list[int] = []
    for size in sizes:
        fits = sum(held) + size <= 100
        assert queue.hold(size) is fits
        held += [size] if fits else []
        if held and rng.random() < 0.5:
            queue.release(held.pop(rng.randrange(len(held))))
        assert queue.held_bytes == sum(held) <= 100
