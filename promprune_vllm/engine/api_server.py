"""Where our routes, headers and fields are added to vLLM's API server: at the places where it is built.

vLLM has endpoint plugins for that, which stay off unless ``VLLM_PLUGINS`` names them. Its list of them is left as
it is, and so is its rule: this is a general plugin, on unless ``VLLM_PLUGINS`` leaves it out, and what it adds to
the server comes with it. ``PROMPRUNE_ENDPOINTS=false`` leaves out the routes.
"""

from __future__ import annotations

from typing import Any

from promprune_vllm.engine import checks, counting
from promprune_vllm.engine.wrapping import wrap

_OURS = "promprune_endpoints"
"""Attribute of the app's state."""


def install() -> None:
    """Wrap the two steps in which an API server takes endpoint plugins in. Idempotent."""
    checks.require_names(checks.API_SERVER_NAMES)
    from vllm.entrypoints.launchers import app
    from vllm.entrypoints.launchers.api_server import app_state
    from vllm.entrypoints.launchers.render import app_state as render_app_state

    # The servers' own names for vLLM's functions: whoever else calls these gets vLLM's answer.
    wrap(app, "attach_endpoint_plugins", _attaching)
    for module in (app_state, render_app_state):
        wrap(module, "init_endpoint_plugins_state", _initializing)


def _attaching(original: Any) -> Any:
    """Wrap the first step: add ours to the app, after vLLM's routes and other plugins'."""

    def attach_endpoint_plugins(app: Any, *args: Any, **kwargs: Any) -> None:
        from promprune_vllm.engine.endpoints import Endpoints

        original(app, *args, **kwargs)
        ours = Endpoints()
        ours.attach_router(app)
        setattr(app.state, _OURS, ours)

    return attach_endpoint_plugins


def _initializing(original: Any) -> Any:
    """Wrap the second step, in which the app's state gets what the routes need."""

    async def init_endpoint_plugins_state(engine_client: Any, state: Any, args: Any) -> None:
        await original(engine_client, state, args)
        ours = getattr(state, _OURS, None)
        if ours is None:  # a batch run, which has a state without an app
            return
        await ours.init_state(engine_client, state, args)
        if engine_client is None:  # a render server, in which no engine's front end starts
            counting.start(state.online_renderer.renderer)

    return init_endpoint_plugins_state
