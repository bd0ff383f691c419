"""While results are still to come: requests are aborted, and the encoder cache has no room for more images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from promprune_vllm.engine.scheduler import failed_images
from promprune_vllm.engine.worker import pruned_model
from tests import runner
from tests.engine.small_steps import (
    FAMILIES,
    NOTHING,
    SMALL_STEPS,
    Answer,
    SmallSteps,
    distinct,
    picture_of_its_own,
    shared_engine,
)

pytestmark = pytest.mark.engine
TOGETHER = SMALL_STEPS
BUDGET = 50
LONG = "x" * 60  # with it behind an image, a prompt takes three steps


@pytest.fixture(params=[*FAMILIES, pytest.param("qwen3_vl", marks=pytest.mark.release)])
def engine(request: pytest.FixtureRequest, demo_model: Path, models: dict[str, Path]) -> SmallSteps:
    return shared_engine(request.param, demo_model, models)


def _remembered(engine: SmallSteps) -> set[str]:
    """Images that our part of the scheduler remembers of requests that were aborted."""
    return set().union(*failed_images._aborted_in_flight(engine.core.scheduler))


WHEN = pytest.mark.parametrize("running", [False, True], ids=["between two steps", "while a step runs"])


@WHEN
@pytest.mark.parametrize("step", [1, 2, 5])
def test_others_answer_as_alone_when_a_request_is_aborted_before_its_result(
    engine: SmallSteps, step: int, running: bool
) -> None:
    """From the first step of its prompt, over one that begins inside its image, to those of its answer."""
    shared, own, other = (picture_of_its_own(i) for i in range(3))
    before = [engine.show(shared, budget=BUDGET, text="a?"), engine.show(other, budget=BUDGET - 1, text="b?")]
    victims = [
        engine.show(own, budget=BUDGET + 9, before="x" * 30, text=LONG),
        engine.show(shared, budget=BUDGET, text="d?"),
    ]
    after = engine.show(own, budget=BUDGET + 9, text="e?")
    expected = [engine.alone(prompt) for prompt in (*before, after)]
    assert distinct(expected)
    engine.forget()
    names = [engine.start(prompt) for prompt in (victims[0], *before, victims[1])]
    answers: dict[str, Answer] = {}
    for _ in range(step):
        answers.update(engine.step())
    aborted = [names[0], names[-1]]
    assert (aborted[0] in engine.in_flight()) == runner.schedules_ahead()
    engine.abort([name for name in aborted if name not in answers], running=running)
    names.append(engine.start(after))  # takes up blocks and rows that have just been given back
    answers.update(engine.finish())
    assert [answers[name] for name in (*names[1:3], names[-1])] == expected
    assert engine.left() == NOTHING
    for _ in range(failed_images._STEPS):
        engine.generate([{"prompt": "Hello."}], tokens=1)
    assert not _remembered(engine)


@contextmanager
def _failing(budget: int) -> Iterator[None]:
    """Let the images of one budget fail."""
    original = pruned_model.select_tokens

    def select(image: Any, keep: int, method: Any) -> Any:
        if keep == budget:
            raise RuntimeError("no luck")
        return original(image, keep, method)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruned_model, "select_tokens", select)
        yield


@WHEN
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_nothing_of_a_failed_image_is_left_when_its_request_is_aborted_before_its_result(
    engine: SmallSteps, shared: bool, running: bool
) -> None:
    """Its blocks are filled from zeros, and another request with the image may share them already."""
    bad = engine.show(picture_of_its_own(0), budget=41, text=LONG)
    good = engine.show(picture_of_its_own(1), budget=BUDGET)
    expected = [engine.alone(bad), engine.alone(good)]
    engine.forget()
    with _failing(41):
        victim, other = engine.start(bad), engine.start(good)
        answers = engine.step()
        assert (victim in answers) != runner.schedules_ahead()
        sharers = [engine.start(bad)] if shared else []
        if victim not in answers:
            engine.abort([victim], running=running)
        answers.update(engine.finish())
    assert [answers[name].reason for name in sharers] == ["error"] * len(sharers)
    assert answers[other] == expected[1]
    assert engine.left() == NOTHING
    again = engine.ask_all([bad, good])
    assert again == expected
    assert again[0].cached == 0
    assert engine.left() == NOTHING


@contextmanager
def _evictions(engine: SmallSteps) -> Iterator[list[tuple[int, int]]]:
    """For each step: images that the encoder cache let go, and requests in a step whose result was to come."""
    scheduler, evictions = engine.core.scheduler, []
    original = scheduler.schedule

    def schedule(*arguments: Any) -> Any:
        assert sum(map(len, engine.rows().values())) <= engine.rows_of_cache
        planned = original(*arguments)
        evictions.append((len(planned.free_encoder_mm_hashes), len(engine.in_flight())))
        return planned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "schedule", schedule)
        yield evictions


def _two_fit(engine: SmallSteps) -> int:
    """A budget with which the encoder cache has room for two images."""
    return engine.rows_of_cache * 2 // 5


def test_more_images_than_the_encoder_cache_holds_answer_as_alone(engine: SmallSteps) -> None:
    """Rows are let go while steps with them are in flight; those of a picture that comes again are made anew."""
    budget = _two_fit(engine)
    pictures = [picture_of_its_own(i) for i in range(6)]
    prompts = [engine.show(picture, budget=budget - i, text=f"{i}?") for i, picture in enumerate(pictures)]
    prompts += [
        engine.show(*pictures[4:1:-1], budget=budget - 9, text="which?"),
        engine.show(pictures[0], text="all?"),
    ]
    prompts.append(engine.show(pictures[0], budget=budget, text=f"{LONG}?"))
    expected = [engine.alone(prompt) for prompt in prompts]
    assert distinct(expected)
    engine.forget()
    with _evictions(engine) as evictions:
        assert engine.ask_all(prompts) == expected
    assert sum(freed for freed, _ in evictions) >= len(pictures)
    assert any(freed and ahead for freed, ahead in evictions) == runner.schedules_ahead()
    assert engine.left() == NOTHING


def test_one_picture_with_many_budgets_at_once_answers_as_alone(engine: SmallSteps) -> None:
    picture, most = picture_of_its_own(3), _two_fit(engine)
    budgets = (most, None, 1, most - 1, most // 2, most, most + 1, 2)
    prompts = [engine.show(picture, budget=budget, text=f"{i}?") for i, budget in enumerate(budgets)]
    expected = [engine.alone(prompt) for prompt in prompts]
    assert distinct(expected)
    engine.forget()
    with _evictions(engine) as evictions:
        assert engine.ask_all(prompts) == expected
    assert any(freed for freed, _ in evictions)
    assert engine.left() == NOTHING


@contextmanager
def _letting_go(engine: SmallSteps) -> Iterator[list[str]]:
    """Let the worker drop what came with an image, once a step has read its rows: as vLLM 0.33 does."""
    cache, states = engine.runner.encoder_cache, engine.runner.req_states
    original, dropped = engine.runner.update_requests, []

    def update_requests(step: Any) -> None:
        original(step)
        for name in step.num_scheduled_tokens:
            computed = states.num_computed_tokens_np[states.req_id_to_index[name]]
            features = list(cache.mm_features[name])  # the engine's own list keeps everything
            for i, feature in enumerate(features):
                place = feature.mm_position
                read = place.offset + place.length <= computed and i not in step.scheduled_encoder_inputs.get(
                    name, ()
                )
                if read and feature.data is not None:
                    features[i] = replace(feature, data=None)
                    dropped.append(feature.identifier)
            cache.mm_features[name] = features

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "update_requests", update_requests)
        yield dropped


@pytest.mark.skipif(not runner.is_v2(), reason="Model Runner V1 keeps it in every minor")
def test_nothing_is_read_that_the_worker_has_let_go(engine: SmallSteps) -> None:
    """Nor where a request has to encode its images again, and where a prefix hit covers them."""
    pictures = [picture_of_its_own(i) for i in range(4)]
    prompts = [
        engine.show(*pictures[:2], budget=BUDGET - i, before=f"{i}{LONG}", text=f"{LONG}{i}?") for i in range(3)
    ]
    prompts.append(engine.show(pictures[3], text="all?"))
    expected = [engine.alone(prompt) for prompt in prompts]
    engine.forget()
    with _letting_go(engine) as dropped:
        names, answers = [engine.start(prompt) for prompt in prompts], {}
        while not dropped:
            answers.update(engine.step())
        assert not answers
        lost = len(dropped)
        assert engine.llm.reset_prefix_cache(reset_running_requests=True)
        engine.core.reset_encoder_cache()
        answers.update(engine.finish())
        assert [answers[name] for name in names] == expected
        assert len(dropped) >= lost + 7, "all of them again"
        hot = engine.ask_all(prompts)
    assert hot == expected
    assert all(answer.cached for answer in hot)
    assert engine.left() == NOTHING
