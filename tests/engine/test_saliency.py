"""The saliency of every tower against eager attention of transformers, on the same weights."""

from __future__ import annotations

import pytest
import torch

from tests.engine.family_engine import FAMILY_ENGINES, SHAPES, FamilyEngine
from tests.engine.test_families import engine  # noqa: F401  a fixture

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
# Of an image's largest saliency, and of a token's own: two towers round queries and keys in ways of their own.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.05, 0.1)}


@pytest.mark.parametrize("shape", SHAPES)
def test_saliency_equals_eager_attention_of_transformers(engine: FamilyEngine, shape: str) -> None:  # noqa: F811
    ours = [group.features.saliency for group in engine.encoded(shape).groups]
    wanted, other_layer = engine.facts.saliency(engine, shape)
    assert len(ours) == len(wanted)
    of_largest, of_own = TOLERANCES[engine.llm.model_config.dtype]
    for saliency, truth, other in zip(ours, wanted, other_layer, strict=True):
        assert float((saliency - truth).abs().max() / truth.max()) < of_largest
        assert float(((saliency - truth) / truth).abs().max()) < of_own
        if len(truth) > 1:
            difference = ((saliency - other) / truth).abs().max()
            assert float(difference) > 10 * of_own, "the wrong layer would pass as well"
