"""Encoder and language model in two engines: what crosses between them is pruned already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import VISUAL_TOKENS
from tests.engine.conftest import Engine

pytestmark = [pytest.mark.engine, pytest.mark.release]
ASKS: tuple[tuple[str, int | None], ...] = (("coffee", None), ("coffee", 64), ("rocket", 16))


def transfer(role: str, store: Path) -> Any:
    from vllm.config import ECTransferConfig

    return ECTransferConfig(
        ec_connector="ECExampleConnector",
        ec_role=role,
        ec_connector_extra_config={"shared_storage_path": str(store)},
    )


def answers(engine: Engine) -> list[tuple[list[int], list[int]]]:
    outputs = engine.generate([engine.prompt(ask) for ask in ASKS], tokens=4)
    return [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]


def test_pruned_rows_cross_from_the_encoder_to_the_language_model(demo_model: Path, tmp_path: Path) -> None:
    alone = Engine(demo_model)
    expected, width = answers(alone), alone.llm.model_config.get_inputs_embeds_size()
    alone.close()

    encoder = Engine(demo_model, ec_transfer_config=transfer("ec_producer", tmp_path))
    answers(encoder)
    encoder.close()
    sent = [load_file(file)["ec_cache"] for file in tmp_path.rglob("*.safetensors")]
    assert sorted(len(rows) for rows in sent) == [16, 64, VISUAL_TOKENS]
    assert {rows.shape[1] for rows in sent} == {width}

    language = Engine(demo_model, ec_transfer_config=transfer("ec_consumer", tmp_path))
    calls: list[torch.Tensor] = []
    language.model.vision_tower.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    assert answers(language) == expected
    assert not calls
    language.close()
