"""Where our routes, headers and fields are added to vLLM's API server: at the places where it is built.

vLLM has endpoint plugins for that, which stay off unless ``VLLM_PLUGINS`` names them. Its list of them is left as
it is, and so is its rule: this is a general plugin, on unless ``VLLM_PLUGINS`` leaves it out, and what it adds to
the server comes with it. ``PROMPRUNE_ENDPOINTS=false`` leaves out the routes.
"""

from __future__ import annotations

from typing import Any

from promprune_vllm.engine.api_server import prompt_metrics
from promprune_vllm.engine.keys import ENDPOINTS


def attach_ours(original: Any) -> Any:
    """Wrap the first step: add ours to the app, after vLLM's routes and other plugins'."""

    def attach_endpoint_plugins(app: Any, *args: Any, **kwargs: Any) -> None:
        from promprune_vllm.engine.api_server.endpoints import Endpoints

        original(app, *args, **kwargs)
        ours = Endpoints()
        ours.attach_router(app)
        setattr(app.state, ENDPOINTS, ours)

    return attach_endpoint_plugins


def init_ours(original: Any) -> Any:
    """Wrap the second step, in which the app's state gets what the routes need."""

    async def init_endpoint_plugins_state(engine_client: Any, state: Any, args: Any) -> None:
        await original(engine_client, state, args)
        ours = getattr(state, ENDPOINTS, None)
        if ours is None:  # a batch run, which has a state without an app
            return
        await ours.init_state(engine_client, state, args)
        if engine_client is None:  # a render server, in which no engine's front end starts
            prompt_metrics.start(state.online_renderer.renderer)

    return init_endpoint_plugins_state
