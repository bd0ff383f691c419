"""What vLLM's own tests ask of a plugin: that errors, its list of endpoint plugins and foreign objects stay so.

`make vllm-tests` runs those tests themselves; each kind of difference that it has found is held here.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from promprune_vllm.engine import plugin
from promprune_vllm.engine.worker.encoder_graphs import leave_out_pruned
from promprune_vllm.server.routes import PATH

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def _file_where_none_may_be_read() -> None:
    from vllm.multimodal.media.connector import MediaConnector

    MediaConnector().fetch_image("file:///nowhere/image.png")


def _pixels_past_pillows_limit() -> None:
    from vllm.multimodal.media.image import ImageMediaIO

    file = io.BytesIO()
    Image.new("L", (100, 100)).save(file, "PNG")
    ImageMediaIO().load_bytes(file.getvalue())


@pytest.mark.parametrize(
    ("load", "original", "said"),
    [
        (_file_where_none_may_be_read, RuntimeError, "Cannot load local files"),
        (_pixels_past_pillows_limit, Image.DecompressionBombError, "exceeds limit"),
    ],
)
def test_an_image_that_is_refused_raises_a_clients_error_that_is_also_the_original_one(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[], None], original: type[Exception], said: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for caught in (ValueError, original):  # the first is what vLLM answers with HTTP 400
        with pytest.raises(caught, match=said):
            load()


def _app() -> Any:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate",))


def _ours(app: Any) -> list[str]:
    return sorted(route.path for route in app.routes if route.path.startswith((PATH, "/promprune")))


@pytest.mark.parametrize("named", [None, "", "promprune", "another"])
def test_vllms_list_of_endpoint_plugins_does_not_change(
    monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    from fastapi import FastAPI
    from vllm.plugins import load_endpoint_plugins
    from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if named is not None:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    assert load_endpoint_plugins(("generate",)) == []
    app = FastAPI()
    attach_endpoint_plugins(app, ("generate",))
    assert app.state.endpoint_plugins == []
    assert _ours(app) == []
    assert _app().state.endpoint_plugins == []


def test_the_api_server_has_our_routes_unless_a_setting_leaves_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with_page = {"/promprune", PATH, f"{PATH}/caches", f"{PATH}/count", f"{PATH}/inspect"}
    assert with_page <= set(_ours(_app()))
    monkeypatch.setenv("PROMPRUNE_INSPECTOR", "false")
    assert _ours(_app()) == [PATH, f"{PATH}/caches", f"{PATH}/count"]
    monkeypatch.setenv("PROMPRUNE_INSPECTOR", "true")
    monkeypatch.setenv("PROMPRUNE_ENDPOINTS", "false")
    bare = _app()
    assert _ours(bare) == []
    assert "VisualTokenHeaders" in {each.cls.__name__ for each in bare.user_middleware}


def test_a_state_without_an_app_is_left_alone() -> None:
    """As ``vllm run-batch`` makes one."""
    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_endpoint_plugins_state

    state = State()
    asyncio.run(init_endpoint_plugins_state(None, state, SimpleNamespace()))
    assert not hasattr(state, "visual_tokens")


@dataclass
class _ModelConfig:
    """All that vLLM itself reads of a text model's configuration to render a completion, and no more."""

    runner_type = "generate"
    trust_remote_code = False
    tokenizer_revision = None
    tokenizer_mode = "auto"
    encoder_config = None
    enable_prompt_embeds = False
    skip_tokenizer_init = True
    is_encoder_decoder = False
    is_multimodal_model = False
    supports_multimodal_inputs = False
    renderer_num_workers = 1
    hf_config = SimpleNamespace(model_type="any")


def test_a_renderer_needs_nothing_that_vllms_own_does_not() -> None:
    from vllm.renderers import TokenizeParams
    from vllm.renderers.hf import HfRenderer

    config = SimpleNamespace(model_config=_ModelConfig(), parallel_config=SimpleNamespace(_api_process_rank=0))
    renderer = HfRenderer(config, tokenizer=None)  # type: ignore[arg-type]
    try:
        (prompt,) = renderer.render_cmpl(
            [{"prompt_token_ids": [1, 2, 3]}], TokenizeParams(max_total_tokens=100, max_output_tokens=0)
        )
    finally:
        renderer.shutdown()
    assert prompt["prompt_token_ids"] == [1, 2, 3]


def test_the_encoders_graphs_of_another_engines_model_stay_as_they_are() -> None:
    """Patches belong to the process, and one of its engines may have a model that is not ours."""
    replayed = [object()]
    manager = SimpleNamespace(model=object())
    assert leave_out_pruned(lambda *_: replayed)(manager, {}) is replayed
