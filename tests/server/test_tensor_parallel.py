"""Two tensor-parallel ranks: each holds half the heads, and both must keep the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from promprune_vllm.demo.server import Server, serving
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import ENVIRONMENT, OPTIONS, ask, series

pytestmark = pytest.mark.server


def test_two_ranks_answer_as_one(server: Server, demo_model: Path, tmp_path: Path) -> None:
    def answers(of: Server) -> list[Any]:
        asked = [ask(of, "coffee", "rocket", visual_token_budget=k, return_token_ids=True) for k in (None, 64, 16)]
        return [(answer["usage"]["prompt_tokens"], answer["choices"][0]["token_ids"]) for answer in asked]

    environment = {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with serving(
        demo_model, *OPTIONS, "--tensor-parallel-size", "2", log=tmp_path / "log", environment=environment
    ) as two:
        assert answers(two) == answers(server)
        # Two images under two budgets that prune: only the first rank counts. The encoder also ran without.
        counts = series(two)
        for stage in ("choose", "assemble"):
            assert counts["promprune_selection_seconds_count", "promprune", stage] == 4
        assert counts["promprune_spectral_entropy_count", "promprune"] == 4
        assert counts["promprune_encoder_batch_tokens_sum",] == 6 * VISUAL_TOKENS
