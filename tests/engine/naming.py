"""What must be true in every family of an image or a video that a request names by its uuid and does not send."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from promprune_vllm.core.budget import Budget
from promprune_vllm.core.policy import BudgetPolicy, MediaPolicy
from promprune_vllm.engine.keys import SUMMARY
from tests.engine.conftest import Engine

Make = Callable[[], dict[str, Any]]
VLLM_SAYS = "Cache miss for {} at index 0 but data is not provided."
BUDGETS = (None, "full", 5000, 7, "25%", 0.5, [9], {"total": 11}, "auto")


def sent(make: Make, budget: object = None, uuids: tuple[str, ...] = ("U",), **options: object) -> dict[str, Any]:
    """A prompt with images or with videos, which it gives names."""
    asked = {} if budget is None else {"visual_token_budget": budget}
    prompt = make()
    (kind,) = prompt["multi_modal_data"]
    return {**prompt, "multi_modal_uuids": {kind: list(uuids)}, "mm_processor_kwargs": {**asked, **options}}


def named(prompt: dict[str, Any], *places: int) -> dict[str, Any]:
    """The same prompt, which only names the images or videos at these places; all of them without any."""
    ((kind, images),) = prompt["multi_modal_data"].items()
    images = images if isinstance(images, list) else [images]
    left = [None if not places or i in places else image for i, image in enumerate(images)]
    return {**prompt, "multi_modal_data": {kind: left}}


def answer(engine: Engine, prompt: dict[str, Any]) -> Any:
    (output,) = engine.generate([prompt], tokens=3)
    logprobs = [{token: value.logprob for token, value in step.items()} for step in output.outputs[0].logprobs]
    return output.prompt_token_ids, output.outputs[0].token_ids, logprobs, output.num_cached_tokens


def refusal(engine: Engine, prompt: dict[str, Any]) -> str:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises((ValueError, VLLMValidationError)) as refused:  # vLLM's own words, or ours
        engine.generate([prompt], tokens=1)
    return str(refused.value)


def processed(engine: Engine, prompt: dict[str, Any]) -> dict[str, Any]:
    """A processed prompt, without its tensors, which the engine may have instead."""
    (found,) = engine.llm.llm_engine.renderer.render_cmpl([prompt])
    return {name: value for name, value in found.items() if name not in ("mm_kwargs", "arrival_time")}


@contextlib.contextmanager
def serving(engine: Engine, policy: BudgetPolicy, level: Fraction | None = None) -> Iterator[None]:
    """As a server with such a policy for images and for videos; with a level, one that adapts to the load."""
    processor = engine.llm.llm_engine.renderer.get_mm_processor()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "_policy", MediaPolicy(policy, policy))
        if level is not None:
            patch.setattr(processor, "current_level", lambda: level)
        yield


def check_it_is_served_as_if_it_were_sent(engine: Engine, make: Make) -> None:
    for budget in BUDGETS:
        engine.forget()
        prompt = sent(make, budget)
        answer(engine, prompt)
        again = answer(engine, prompt)
        assert again[-1] > 0 or budget not in (None, "full"), "nothing came from the prefix cache"
        assert answer(engine, named(prompt)) == again, budget
        assert processed(engine, named(prompt)) == processed(engine, prompt), budget


def check_the_servers_own_default_is_applied(engine: Engine, make: Make) -> None:
    for policy in (BudgetPolicy(default=Budget(tokens=6), floor=1), BudgetPolicy(maximum=5)):
        engine.forget()
        with serving(engine, policy):
            for options in ({}, {"visual_token_detail": ("low",)}):
                prompt = sent(make, **options)
                answer(engine, prompt)
                again = answer(engine, prompt)
                assert answer(engine, named(prompt)) == again
    everything = sent(make)
    assert "Cache miss for" in refusal(engine, named(everything))  # what is cached has lost tokens


def check_a_level_is_the_one_it_was_sent_with(engine: Engine, make: Make) -> None:
    """A level of the load that changes meanwhile would look for an image that nobody has sent."""
    engine.forget()
    policy = BudgetPolicy(floor=1)
    with serving(engine, policy, Fraction(1, 4)):
        prompt = sent(make)
        answer(engine, prompt)
        again = answer(engine, prompt)
    with serving(engine, policy, Fraction(1, 2)):
        assert answer(engine, named(prompt)) == again


def check_another_image_is_never_served(engine: Engine, make: Make, other: Make) -> None:
    """What is not in the cache as it is asked for gets one sentence, and the engine goes on."""
    engine.forget()
    prompt = sent(make, 7)
    (kind,) = prompt["multi_modal_data"]
    assert refusal(engine, named(sent(make, uuids=("new",)))) == VLLM_SAYS.format(kind)  # as vLLM alone
    for budget in (7, "25%", {"total": 9}, [5]):
        said = refusal(engine, named(sent(make, budget, uuids=("new",))))
        assert "does not know enough about uuid 'new'" in said
        assert f"Send the {kind} itself once" in said
    first = answer(engine, prompt)
    for budget in (None, "full", 8, "25%", {"total": 9}):
        said = refusal(engine, named(sent(make, budget)))
        assert VLLM_SAYS.format(kind) in said
        assert "uuid 'U' is not or no longer in the cache" in said
        assert f"Send the {kind} itself once" in said
    engine.llm.reset_mm_cache()
    assert "With 7 of its" in refusal(engine, named(prompt))
    assert answer(engine, prompt)[1] == first[1]

    # The name of another image by mistake: in the cache, the first one counts, with its own size.
    mistaken, whole = sent(other, 7), sent(make)
    answer(engine, whole)
    answer(engine, mistaken)
    assert answer(engine, named(mistaken)) == answer(engine, mistaken)
    assert answer(engine, named(whole))[:3] == answer(engine, whole)[:3]
    counts = [processed(engine, prompt)[SUMMARY].images[0].kept for prompt in (sent(other), whole, named(whole))]
    assert len(set(counts)) == 1


def check_some_of_several_are_named(engine: Engine, make: Make) -> None:
    """``make`` makes a prompt with two images."""
    for budget in (None, 7, [6, "full"], {"total": 20}):
        engine.forget()
        prompt = sent(make, budget, ("U", "V"))
        answer(engine, prompt)
        again = answer(engine, prompt)
        for places in ((0,), (1,), (0, 1)):
            assert answer(engine, named(prompt, *places)) == again, (budget, places)
    assert "has 3 entries" in refusal(engine, named(sent(make, [1, 2, 3], ("U", "V"))))


def check_a_processed_prompt_equals_itself_across_the_cache(engine: Engine, make: Make) -> None:
    """vLLM's own invariant, see its ``test_processing_correctness``."""
    for budget in (None, 7, "25%"):
        engine.forget()
        prompt = {**sent(make, budget), "multi_modal_uuids": None}
        new, cached = processed(engine, prompt), processed(engine, prompt)
        assert new == cached
        assert (new[SUMMARY].cached, cached[SUMMARY].cached) == ((False,), (True,))
        assert new[SUMMARY] != replace(new[SUMMARY], method="another")


CHECKS = [
    check_it_is_served_as_if_it_were_sent,
    check_the_servers_own_default_is_applied,
    check_a_level_is_the_one_it_was_sent_with,
    check_a_processed_prompt_equals_itself_across_the_cache,
]
"""Of a prompt with one image."""
