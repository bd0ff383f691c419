"""A module of the vision tower has a hook only while a method needs what the hook captures.

vLLM compiles towers and captures graphs of them, and a hook in the way costs either. The test looks for hooks from
inside the tower's own ``forward``, which it wraps: a hook of the test would be one more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from promprune_vllm import Need, get_method, methods
from promprune_vllm.core.features import OF_TOWER
from tests.engine.family_engine import EVERYTHING, FAMILY_ENGINES, FamilyEngine, shared_engine
from tests.engine.family_facts import KINDS

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
SERVED = [
    name for name, method in methods(over_frames=False).items() if not method.needs & ~(EVERYTHING | Need.TEXT)
]


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> FamilyEngine:
    return shared_engine(request.param, models[request.param])


def hooked(engine: FamilyEngine) -> set[str]:
    """Modules of the tower and of what projects its output that have a hook now, by name."""
    return {
        ".".join(filter(None, (root, name)))
        for root, tower in engine.towers.items()
        for name, module in tower.named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    }


@contextmanager
def looking(engine: FamilyEngine) -> Iterator[list[set[str]]]:
    """The modules with hooks at each call of the tower's and the projectors' ``forward``."""
    seen: list[set[str]] = []

    def wrap(forward: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            seen.append(hooked(engine))
            return forward(*arguments, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for tower in engine.towers.values():
            patch.setattr(tower, "forward", wrap(tower.forward))
        yield seen


def while_pruning(engine: FamilyEngine, name: str) -> set[str]:
    """Modules that have a hook while an image is encoded and pruned by a method; afterwards there are none."""
    engine.forget()
    with pytest.MonkeyPatch.context() as patch, looking(engine) as seen:
        patch.setattr(engine.model, "_methods", [get_method(name)])
        (output,) = engine.generate([engine.ask("portrait", budget=9)], tokens=1)
    assert output.outputs[0].finish_reason == "length"
    assert len(engine.rows()) == 1
    assert [len(rows) for rows in engine.rows().values()] == [9]
    assert seen, "the tower did not run"
    assert hooked(engine) == set()
    return set().union(*seen)


@pytest.mark.parametrize("name", [name for name in SERVED if not methods()[name].needs & OF_TOWER])
def test_a_method_that_needs_nothing_of_the_tower_leaves_it_without_hooks(engine: FamilyEngine, name: str) -> None:
    assert while_pruning(engine, name) == set()


# One method for each set of features: which hooks there are depends on nothing else.
READERS = {methods()[name].needs & OF_TOWER: name for name in SERVED if methods()[name].needs & OF_TOWER}


@pytest.mark.parametrize("name", READERS.values())
def test_a_method_has_exactly_the_hooks_that_it_needs(engine: FamilyEngine, name: str) -> None:
    """On one layer's attention for saliency and keys, at the projector's input for what the encoder returns."""
    needs, found = methods()[name].needs, while_pruning(engine, name)
    attention = {module for module in found if module.endswith(".attn")}
    assert len(attention) == bool(needs & (Need.SALIENCY | Need.KEYS))
    projector = found - attention
    assert len(projector) == bool(needs & Need.ENCODER)
    own = engine.facts.projector
    connectors = (own,) if own else tuple(engine.model.get_mm_mapping().connector)
    assert all(module.startswith(connectors) for module in projector)


def test_an_image_that_keeps_every_token_is_encoded_without_hooks(engine: FamilyEngine) -> None:
    engine.forget()
    with looking(engine) as seen:
        engine.generate([engine.ask("portrait", budget=5000), engine.ask("square")], tokens=1)
    assert seen
    assert set().union(*seen) == set()
