"""Wrappers that add our routes, headers and fields to vLLM's API server while it is built.

vLLM has endpoint plugins for this, but loads them only if ``VLLM_PLUGINS`` names them. We leave that rule and
vLLM's list of endpoint plugins alone. PromPrune is a general plugin, which vLLM loads unless ``VLLM_PLUGINS``
excludes it, and its additions to the server come with it. ``PROMPRUNE_ENDPOINTS=false`` leaves out the routes.
"""

from __future__ import annotations

from typing import Any

from promprune_vllm.engine.api_server import audit, borrowed_mu, prompt_metrics
from promprune_vllm.engine.keys import ENDPOINTS


def attach_endpoints(original: Any) -> Any:
    """Wrap the first step: add our endpoints to the app, after the routes of vLLM and of other plugins."""

    def attach_endpoint_plugins(app: Any, *args: Any, **kwargs: Any) -> None:
        from promprune_vllm.engine.api_server.endpoints import Endpoints

        original(app, *args, **kwargs)
        endpoints = Endpoints()
        endpoints.attach_router(app)
        setattr(app.state, ENDPOINTS, endpoints)

    return attach_endpoint_plugins


def init_endpoints(original: Any) -> Any:
    """Wrap the second step: give the app's state the backend of our routes, and check and warn about settings."""

    async def init_endpoint_plugins_state(engine_client: Any, state: Any, args: Any) -> None:
        await original(engine_client, state, args)
        if (renderer := getattr(state, "online_renderer", None)) is not None:  # else it is no server of vLLM's
            borrowed_mu.warn(renderer.renderer)
            audit.start(engine_client, renderer.renderer.config)
        endpoints = getattr(state, ENDPOINTS, None)
        if endpoints is None:  # a batch run, which has a state but no app
            return
        await endpoints.init_state(engine_client, state, args)
        if engine_client is None:  # a render server, which has no engine client to start the metrics
            prompt_metrics.start(state.online_renderer.renderer)

    return init_endpoint_plugins_state
