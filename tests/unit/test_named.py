"""Images named by uuid: what is remembered of them, and when nothing need be. And the types of our options."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from promprune_vllm.core.budget import FIELD, IMAGE, METHOD_FIELD, Budget, BudgetRequest
from promprune_vllm.core.policy import BudgetPolicy, MediaPolicy
from promprune_vllm.engine.api_server.all_media import AllMedia
from promprune_vllm.engine.api_server.named_images import (
    ImageMemory,
    PromptImages,
    RememberedImage,
    Size,
    require_cached,
)
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan, Plan
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.api_server.request_fields import PruningFields
from promprune_vllm.engine.keys import DETAIL_OPTION, TEXT_OPTION
from promprune_vllm.errors import BudgetError

PLAIN = BudgetPolicy()
BUDGETS = st.one_of(
    st.none(),
    st.integers(1, 100).map(lambda tokens: Budget(tokens=tokens)),
    st.fractions(Fraction(1, 100), 1).filter(lambda share: share > 0).map(lambda share: Budget(share=share)),
)
LEVELS = st.sampled_from([Fraction(1), Fraction(1, 2), Fraction(1, 8)])


class Items:
    """As vLLM has the images of a prompt."""

    def __init__(self, *images: Image.Image | None) -> None:
        self._images = images

    def get_count(self) -> int:
        return len(self._images)

    def get(self, index: int) -> Image.Image | None:
        return self._images[index]

    def get_image_size(self, index: int) -> tuple[int, int]:
        image = self._images[index]
        if image is None:
            raise ValueError(f"Cannot get size of cached image at {index}")
        return image.size


class Cache:
    """As vLLM's processor cache: something that memories live as long as."""

    def __init__(self, *keys: str) -> None:
        self._keys = keys

    def is_cached(self, keys: Sequence[str]) -> list[bool]:
        return [key in self._keys for key in keys]


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "navy")


def decide(
    images: PromptImages, budget: object = "auto", level: int = 1, *, adapts: bool = False
) -> list[Fraction]:
    every = AllMedia({IMAGE: images}, [(IMAGE, i) for i in range(images.get_count())])
    policy = MediaPolicy(images=PLAIN)
    now = dict.fromkeys(every.kinds, Fraction(1, level))
    return every.decide_levels(BudgetRequest.parse(budget), policy, now, adapts=adapts)


def test_a_name_is_remembered_beside_its_cache_alone() -> None:
    cache = Cache()
    PromptImages(Items(picture(30, 20), picture(7, 5)), ["a", None], cache).remember([False, False])
    found = PromptImages(Items(None, None, picture(8, 8)), ["a", "b", None], cache)
    assert found.sizes == [(30, 20), None, (8, 8)]
    assert found.named_uuids == {0: "a"}
    assert PromptImages(Items(None), ["a"], Cache()).sizes == [None]
    assert PromptImages(Items(None), ["a"], None).sizes == [None]
    nowhere = PromptImages(Items(picture(3, 3)), ["a"], None)
    nowhere.remember([False])
    assert nowhere.sizes == [(3, 3)]


def test_what_is_sent_has_its_own_size_and_what_the_cache_had_first_is_remembered() -> None:
    cache = Cache()
    PromptImages(Items(picture(30, 20)), ["a"], cache).remember([False])
    other = PromptImages(Items(picture(4, 4)), ["a"], cache)
    assert other.sizes == [(4, 4)]
    other.remember([True])
    assert PromptImages(Items(None), ["a"], cache).sizes == [(30, 20)]
    other.remember([False])
    assert PromptImages(Items(None), ["a"], cache).sizes == [(4, 4)]


def test_the_names_used_last_are_remembered() -> None:
    memory = ImageMemory(capacity=2)
    for uuid in ("a", "b"):
        memory.store(uuid, RememberedImage(Size(1, 1)))
    assert memory.find("a")
    memory.store("c", RememberedImage(Size(2, 2)))
    assert [memory.find(uuid) is None for uuid in ("a", "b", "c")] == [False, True, False]


@pytest.mark.parametrize(
    "uuid", ["", "x" * 10**6, "\ud800", 7, b"\xff", ("a", 1)], ids=lambda uuid: repr(uuid)[:9]
)
def test_any_name_will_do(uuid: Any) -> None:
    memory = ImageMemory()
    memory.store(uuid, RememberedImage(Size(1, 2)))
    assert memory.find(uuid) == RememberedImage(Size(1, 2))
    assert memory.find("7") is None


def test_a_level_is_remembered_with_the_size() -> None:
    cache = Cache()
    plain, new = Items(picture(60, 60)), Items(None)
    first = PromptImages(plain, ["a"], cache)
    assert decide(first, level=2) == [Fraction(1, 2)]
    first.remember([False])
    assert decide(PromptImages(new, ["a"], cache), level=1) == [Fraction(1, 2)]
    looking = PromptImages(plain, ["a"], cache)
    (level,) = decide(looking, adapts=True)
    assert level < 1
    looking.remember([True])
    explicit = PromptImages(plain, ["a"], cache)
    assert decide(explicit, 64, adapts=True) == [1]
    explicit.remember([True])
    assert decide(PromptImages(new, ["a"], cache), adapts=True) == [level]


def test_content_that_nobody_looked_at_is_not_guessed() -> None:
    cache = Cache()
    PromptImages(Items(picture(60, 60)), ["a"], cache).remember([False])
    by_name = PromptImages(Items(None), ["a"], cache)
    assert decide(by_name) == [1]
    assert decide(by_name, "full", adapts=True) == [1]
    with pytest.raises(BudgetError, match="Send the image itself once"):
        decide(by_name, adapts=True)


@pytest.mark.parametrize("value", [64, "25%", {"total": 3}, [1]], ids=str)
def test_a_budget_for_an_unknown_image_is_refused_with_the_next_step(value: object) -> None:
    with pytest.raises(BudgetError, match=r"uuid 'a' .* Send the image itself once") as refused:
        decide(PromptImages(Items(None), ["a"], Cache()), value)
    assert refused.value.reason == "unsupported"
    with pytest.raises(BudgetError, match="--mm-processor-cache-gb 0"):
        decide(PromptImages(Items(None), ["a"], None), value)
    assert decide(PromptImages(Items(None), ["a"], Cache()), "full") == [1]


def test_what_is_not_cached_as_asked_for_is_refused_with_the_next_step() -> None:
    plan = Plan({IMAGE: (ImagePlan(9, 9), ImagePlan(9, 4))}, named_uuids={IMAGE: {1: "a"}})
    require_cached(plan, IMAGE, ["x", "y"], Cache("y"))
    with pytest.raises(BudgetError, match=r"index 1 .* With 4 of its 9 tokens, uuid 'a' .* Send the image itself"):
        require_cached(plan, IMAGE, ["x", "y"], Cache("x"))


def test_what_keeps_everything_is_what_the_cache_has() -> None:
    images = PromptImages(Items(None, picture(9, 9)), ["a", "b"], Cache())
    decide(images)
    plans = (ImagePlan(1, 1), ImagePlan(5, 5, size=(9, 9)))
    assert [(plan.total, plan.kept) for plan in images.final_plans(plans, [7, 5])] == [(7, 7), (5, 5)]
    decide(PromptImages(Items(picture(9, 9)), ["b"], Cache()), 64)
    limited = PromptImages(Items(picture(9, 9)), ["b"], Cache())
    decide(limited, 64)
    with pytest.raises(BudgetError, match="given to two images: the one in the cache has 90 tokens"):
        limited.final_plans(plans[1:], [90])


@given(budget=BUDGETS, level=LEVELS, total=st.integers(1, 5000), default=BUDGETS)
def test_an_image_keeps_all_where_the_policy_says_so(
    budget: Budget | None, level: Fraction, total: int, default: Budget | None
) -> None:
    for policy in (BudgetPolicy(default=default), BudgetPolicy(default=default, maximum=50)):
        if policy.keeps_all(budget, level):
            assert policy.resolve(budget, total, level) == total
        else:
            assert policy.resolve(budget, 10**30, level) < 10**30
    assert not BudgetPolicy(default=default).keeps_all(None, None)


@pytest.mark.parametrize(
    ("option", "values", "wanted"),
    [
        (FIELD, [True, {"a": 1}, "x", [None], object()], "must be"),
        (TEXT_OPTION, [5, b"x", ["x"], {}, object()], "must be a string"),
        (DETAIL_OPTION, [5, "low", [5], {"low": 1}, [None], object()], "must be a list"),
    ],
)
def test_an_option_of_a_wrong_type_is_refused_by_name(option: str, values: list[Any], wanted: str) -> None:
    for value in values:
        with pytest.raises(BudgetError, match=wanted) as refused:
            PruningRequest.split_options({option: value, "size": 1})
        assert str(refused.value).startswith(option)
        assert type(value).__name__ in str(refused.value) or option == FIELD
        assert refused.value.param == option


def test_options_of_the_right_type_are_taken() -> None:
    given_options = {FIELD: 9, METHOD_FIELD: "x", TEXT_OPTION: "what?", DETAIL_OPTION: ["low"], "size": 1}
    assert PruningFields.split_options(given_options) == (PruningFields(9, "x", "what?", ("low",)), {"size": 1})
