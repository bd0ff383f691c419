"""``--mm-encoder-tp-mode``: two ranks that share the encoder's work keep the same tokens, and answer as one."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from promprune_vllm.demo.families import build_family_model
from promprune_vllm.engine.keys import CACHE_SIZE_METHOD
from promprune_vllm.metrics.recorder import DIRECTORY_VARIABLE
from tests.engine.family_engine import FamilyEngine
from tests.engine.family_facts import engine_options
from tests.engine.test_families import difference

pytestmark = [pytest.mark.engine, pytest.mark.release]
# They look at saliency, at the tower's features, at its keys, and at its output alone.
METHODS = ("promprune", "prunesid", "visionzip", "divprune")
ROUNDING = 1e-4  # two ranks add up in another order


# Towers of patches, and one of tiles, of which a rank has fewer than the other, or none; at last one whose ranks
# encode every image and share the heads.
SHARED = [("qwen2_5_vl", "data"), ("internvl_chat", "data"), ("internvl_chat", "weights")]
ENCODED, FOUND = 3, 5
"""With the feature cache, images of the requests below that are encoded and that are found."""


@pytest.mark.parametrize("cache_gb", ["0", "0.1"])
@pytest.mark.parametrize(("family", "mode"), SHARED)
def test_ranks_that_share_the_work_answer_as_one(
    family: str, mode: str, cache_gb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_family_model(family, tmp_path / family)
    monkeypatch.setenv("PROMPRUNE_ALLOW_METHODS", ",".join(METHODS))
    alone = FamilyEngine(family, model)
    asks = [alone.ask("landscape"), alone.ask("landscape", "portrait", "tiny", budget=11)]
    for i, method in enumerate(METHODS):
        asks.append(alone.ask("portrait", budget=20 + i))
        asks[-1]["mm_processor_kwargs"]["visual_token_method"] = method
    expected = answers(alone, asks)
    alone.close()

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("PROMPRUNE_FEATURE_CACHE_GB", cache_gb)
    before = of_feature_caches()
    sharded = TwoRanks(family, model, mode)
    try:
        for one, two in zip(expected, answers(sharded, asks), strict=True):
            assert one.prompt_token_ids == two.prompt_token_ids
            assert one.outputs[0].token_ids == two.outputs[0].token_ids
            assert difference(one, two) < ROUNDING
        one_rank, other_rank = (stored for *_, stored in sharded.llm.collective_rpc(CACHE_SIZE_METHOD))
        assert one_rank == other_rank
        if cache_gb == "0":
            assert one_rank is None
        else:
            assert one_rank[0] == ENCODED
            grown = of_feature_caches() - before
            stored_bytes = one_rank[1]
            assert grown == {"miss": ENCODED, "hit": FOUND, "bytes": stored_bytes}, "only one rank counts"
    finally:
        sharded.close()


def answers(engine: FamilyEngine, asks: list[dict[str, Any]]) -> list[Any]:
    return [*engine.generate(asks[:2]), *(engine.generate([ask])[0] for ask in asks[2:])]


def of_feature_caches() -> Counter[str]:
    """What all engines that this process has started have found in feature caches, and their bytes."""
    registry, counted = CollectorRegistry(), Counter[str]()
    MultiProcessCollector(registry, path=os.environ[DIRECTORY_VARIABLE])
    for sample in (sample for family in registry.collect() for sample in family.samples):
        if sample.name.startswith("promprune_feature_store_"):
            counted[sample.labels.get("result", "bytes")] += int(sample.value)
    return counted


class TwoRanks(FamilyEngine):
    """An engine whose workers are processes: nobody can look into them from here."""

    def __init__(self, family: str, model: Path, mode: str) -> None:
        from vllm import LLM

        self.family = family
        self.llm = LLM(
            str(model),
            **engine_options(family),
            max_model_len=1536,
            enforce_eager=True,
            block_size=32,
            seed=0,
            num_gpu_blocks_override=64,
            tensor_parallel_size=2,
            mm_encoder_tp_mode=mode,
        )

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
