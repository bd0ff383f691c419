"""A target instead of a budget: the ladder keeps its promise on streams of audits whose agreement is known."""

import random
from fractions import Fraction

import pytest

from promprune_vllm.core.target import (
    ERROR,
    SHARES,
    Ladder,
    log_evidence,
    parse_target,
    size_class,
)
from promprune_vllm.errors import BudgetError

LOSS_BY_STEP = 3.0  # how much more often answers differ at each smaller share


def follow(ladder: Ladder, agreement: list[float], audits: int, rng: random.Random) -> float:
    """Feed a ladder with audits; return the share of time that it spends below its target."""
    below = 0
    for _ in range(audits):
        index = ladder.index
        below += agreement[index] < ladder.target
        ladder.observe(SHARES[index], rng.random() < agreement[index])
        if ladder.index == index and ladder.next_share is not None:
            ladder.observe(ladder.next_share, rng.random() < agreement[index + 1])
    return below / audits


def falling(target: float, rng: random.Random) -> list[float]:
    """Draw the agreement of each share: all tokens agree, and each step loses three times as much as the last."""
    loss = (1 - target) * LOSS_BY_STEP ** rng.uniform(-7, 1)
    return [1.0, *(max(0.0, 1 - loss * LOSS_BY_STEP**step) for step in range(len(SHARES) - 1))]


@pytest.mark.parametrize(
    ("target", "audits", "streams"),
    [
        (0.8, 800, 100),
        pytest.param(0.8, 800, 1_000, marks=pytest.mark.release),
        pytest.param(0.95, 4_000, 200, marks=pytest.mark.release),
        pytest.param(0.99, 16_000, 100, marks=pytest.mark.release),
    ],
)
def test_streams_stay_above_their_target_and_find_their_share(target: float, audits: int, streams: int) -> None:
    below, steps = [], []
    for seed in range(streams):
        rng = random.Random(seed)
        agreement, ladder = falling(target, rng), Ladder(target)
        below.append(follow(ladder, agreement, audits, rng))
        best = max(index for index, value in enumerate(agreement) if value >= target)
        steps.append(best - ladder.index)
    assert sum(below) / len(below) <= ERROR
    assert sum(time > 0 for time in below) <= ERROR * len(below)
    assert max(map(abs, steps)) <= 2
    assert sum(abs(step) <= 1 for step in steps) >= (1 - ERROR) * len(steps)


@pytest.mark.parametrize("streams", [100, pytest.param(500, marks=pytest.mark.release)])
def test_shares_just_below_the_target_are_rarely_served(streams: int) -> None:
    """The worst case for a proof: hundreds of looks at a share that is nearly good enough."""
    agreement = [1.0] + [0.79] * (len(SHARES) - 1)
    served = 0
    for seed in range(streams):
        served += follow(Ladder(0.8), agreement, 800, random.Random(seed)) > 0
    assert served <= ERROR * streams


def test_a_proof_that_is_given_up_counts_as_an_attempt() -> None:
    """Else a share that goes up and down without end would let the next one be tested without end."""
    ladder = Ladder(0.8, index=1)
    ladder.observe(SHARES[2], True)
    while ladder.index:
        ladder.observe(SHARES[1], False)
    assert ladder.attempts[:4] == [0, 1, 1, 0]
    while not ladder.index:
        ladder.observe(SHARES[1], True)
    while ladder.index:  # this time, nothing was known of the next share
        ladder.observe(SHARES[1], False)
    assert ladder.attempts[:4] == [0, 2, 1, 0]


def test_the_bound_holds_at_every_time_at_once() -> None:
    """Evidence may be looked at after every audit: the bound is wrong anywhere in a stream in 5% at most."""
    wrong = 0
    for seed in range(400):
        rng, agreed, differed = random.Random(seed), 0, 0
        for _ in range(300):
            same = rng.random() < 0.9
            agreed, differed = agreed + same, differed + (not same)
            if log_evidence(agreed, differed, 0.9, exceeded=True) > 3.0:  # e to the 3 is 20
                wrong += 1
                break
    assert wrong <= 0.05 * 400


def test_a_change_for_the_worse_moves_up_at_once() -> None:
    ladder, rng = Ladder(0.95), random.Random(0)
    follow(ladder, [1.0] * len(SHARES), 3_000, rng)
    assert ladder.share == SHARES[-1]
    audits = 0
    while ladder.share == SHARES[-1]:
        ladder.observe(SHARES[-1], rng.random() < 0.5)
        audits += 1
    assert audits < 20
    follow(ladder, [1.0, *[0.5] * (len(SHARES) - 1)], 200, rng)
    assert ladder.share == 1
    follow(ladder, [1.0] * len(SHARES), 3_000, rng)
    assert ladder.share == SHARES[-1], "it must find the way back when traffic is as before"


def test_a_second_attempt_needs_more_evidence() -> None:
    ladder = Ladder(0.9)
    first = ladder.allowed_error
    while not ladder.attempts[1]:
        ladder.observe(SHARES[1], False)
    assert ladder.allowed_error == pytest.approx(first / 3)
    assert ladder.share == 1


def test_audits_of_other_shares_change_nothing() -> None:
    ladder = Ladder(0.9)
    for share in (SHARES[2], Fraction(1, 7), SHARES[0]):
        for agreed in (True, False):
            ladder.observe(share, agreed)
    assert ladder == Ladder(0.9)


def test_classes_of_sizes() -> None:
    assert [size_class(tokens) for tokens in (1, 1024, 1025, 4096, 4097, 184_000)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("text", "target"), [("99%", 0.99), (" 99.5% ", 0.995), ("0.9", 0.9), ("50%", 0.5)])
def test_a_target_is_a_share(text: str, target: float) -> None:
    assert parse_target(text) == pytest.approx(target)


@pytest.mark.parametrize("text", ["100%", "1", "99", "49%", "-1%", "nan", "", "%", "all"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="A target must be the share of answers that stay the same"):
        parse_target(text)
