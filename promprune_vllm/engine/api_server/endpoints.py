"""Our additions to vLLM's HTTP server, in the form of vLLM's ``EndpointPlugin``. ``app_hooks`` adds them.

The routes require the server's API key. The inspector sends a chat request through the engine; the other routes
only read settings and count tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import vllm
from fastapi import Request
from fastapi.responses import Response

import promprune_vllm
from promprune_vllm.config import Settings
from promprune_vllm.core.budget import VIDEO
from promprune_vllm.core.policy import BudgetPolicy
from promprune_vllm.core.registry import options_of
from promprune_vllm.engine import families
from promprune_vllm.engine.api_server import audit, escalation_refusals, http_fields, inspected_reply
from promprune_vllm.engine.api_server.admission import admit, require_prunable, served_name, unsupported_reason
from promprune_vllm.engine.api_server.counting import TokenCounter
from promprune_vllm.engine.api_server.inspected_answer import Question
from promprune_vllm.engine.api_server.inspector import Inspector
from promprune_vllm.engine.api_server.prompt_savings import bytes_per_token
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.api_server.request_fields import PruningFields, find_field
from promprune_vllm.engine.api_server.retry_plan import escalation_in_force
from promprune_vllm.engine.api_server.target_levels import target_state
from promprune_vllm.engine.api_server.vllm_check import vllm_check
from promprune_vllm.engine.compat import parts, seams, verdict
from promprune_vllm.errors import BudgetError
from promprune_vllm.server.field_schemas import field_schemas
from promprune_vllm.server.inspect_schemas import InspectReply, InspectRequest
from promprune_vllm.server.near_misses import FIELDS
from promprune_vllm.server.near_misses import check as check_names
from promprune_vllm.server.openapi import document
from promprune_vllm.server.page import page
from promprune_vllm.server.reply_headers import VisualTokenHeaders
from promprune_vllm.server.route_table import POST_ROUTES
from promprune_vllm.server.routes import router
from promprune_vllm.server.schemas import (
    Adaptation,
    Audit,
    CacheBytes,
    CachesReply,
    CountReply,
    CountRequest,
    EncoderCache,
    Escalation,
    FeatureCache,
    ImageCount,
    Limits,
    Method,
    ProcessorCache,
    Range,
    VisualTokens,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

_VIDEO_URL = "data:video/"


class Endpoints:
    """Implements vLLM's ``EndpointPlugin``."""

    name = "promprune"
    required_tasks = None
    """None means every task: a server that cannot prune says so."""

    def __init__(self) -> None:
        used = (parts.ROUTES, parts.INSPECTOR, parts.SAVINGS)
        seams.require(*(part for part in used if not verdict.current().is_off(part)))

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, headers, usage fields and schemas."""
        http_fields.attach(app)
        # vLLM adds its own middleware later, so ours runs inside it: a refused API key never gets this far.
        app.add_middleware(VisualTokenHeaders)
        settings = Settings.from_environment()
        if settings.endpoints:
            app.include_router(router(inspector=settings.inspector))
            if settings.inspector:
                app.include_router(page())
        document(app, field_schemas(settings.allowed))

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:  # noqa: ARG002
        """Give the routes their backend; vLLM's state is complete by now."""
        renderer = state.online_renderer.renderer
        state.visual_tokens = EngineBackend(renderer, Inspector(engine_client, state))


class EngineBackend:
    """The ``Backend`` of our routes; it uses the same processor as the requests."""

    def __init__(self, renderer: Any, inspector: Inspector) -> None:
        self._renderer = renderer
        self._inspector = inspector
        self._counter = TokenCounter(renderer, inspector)
        self._settings = Settings.from_environment()

    def check_fields(self, body: Mapping[str, Any], path: str) -> PruningRequest:
        """Return what a request asks for, admitted.

        Args:
            body: The decoded JSON of a request to any of vLLM's routes.
            path: The route's.

        Raises:
            VLLMValidationError: Our fields are misspelled, misplaced or invalid, or the server cannot honor them.
        """
        with refusing(self._renderer.model_config):
            check_names(body)
            budget, method, escalate = (find_field(body, name) for name in FIELDS)
            request = PruningRequest.parse(PruningFields(budget, method, escalate=escalate))
            admit(self._renderer, request)
            route = POST_ROUTES.get(path)
            if request.asks_again and not (route and route.asks_again):
                escalation_refusals.refuse(f"{path} generates no answer")
        return request

    def state(self) -> VisualTokens:
        """Return the settings in force."""
        config = self._renderer.model_config
        family = families.family_of(config.architectures)
        reason = unsupported_reason(self._renderer)
        methods = self._methods
        return VisualTokens(
            version=promprune_vllm.__version__,
            vllm_version=vllm.__version__,
            vllm_check=vllm_check(verdict.current()),
            model=served_name(config),
            architecture=config.architecture,
            family=None if family is None else family.model,
            prunable=reason is None,
            reason=reason,
            method=methods[0],
            allowed_methods=methods,
            limits=self._limits(),
            adaptation=Adaptation(
                to_load=self._settings.adapt_to_load,
                to_content=self._settings.adapt_to_content,
                level=1.0 if reason else float(self._renderer.mm_processor.current_level()),
            ),
            escalation=self._escalation(),
            audit=self._audit(),
            target=target_state(self._settings.agreement(), config.served_model_name),
            fields=field_schemas(self._settings.allowed),
        )

    def _escalation(self) -> Escalation:
        reason = escalation_refusals.unsupported_reason(self._renderer.model_config)
        switch = {"on": self._settings.escalate is not None, "reason": reason}
        return Escalation.model_validate({**self._settings.escalation().printed(), **switch})

    def _audit(self) -> Audit:
        share = self._settings.audited_share()
        reason = audit.unsupported_reason(self._renderer.config) if self._inspector.has_engine else audit.NO_ENGINE
        return Audit(on=share > 0, share=share, reason=reason)

    async def count(self, body: CountRequest) -> CountReply | Response:
        """Return how many tokens a request would keep; raise the same errors as that request."""
        counts = await self._counter.count(body)
        if isinstance(counts, Response):
            return counts
        seen, kept = (sum(values) for values in zip(*counts, strict=True))
        each = [ImageCount(seen=before, kept=after) for before, after in counts]
        images, videos = (each, []) if body.videos is None else ([], each)
        return CountReply(seen=seen, kept=kept, images=images, videos=videos, kv_cache=self._bytes(seen, kept))

    async def caches(self) -> CachesReply:
        """Return what the image caches hold."""
        with refusing(None):
            require_prunable(self._renderer, "report")
        engines = await self._inspector.cache_sizes()
        capacity = self._inspector.capacity_rows
        encoder = [EncoderCache(images=images, rows=rows, capacity_rows=capacity) for images, rows, _ in engines]
        features = [
            FeatureCache(images=stored[0], bytes=stored[1], capacity_bytes=stored[2])
            for *_, stored in engines
            if stored is not None
        ]
        # A private attribute: the cache's public interface reports hits and misses, not its contents.
        cache = getattr(self._renderer.mm_processor_cache, "_cache", None)
        processor = None
        if cache is not None:
            used, capacity_bytes = int(cache.currsize), int(cache.capacity)
            processor = ProcessorCache(images=len(cache), bytes=used, capacity_bytes=capacity_bytes)
        return CachesReply(processor=processor, encoder=encoder, features=features or None)

    async def inspect(self, body: InspectRequest, request: Request) -> InspectReply | Response:
        """Return which tokens of an image or a video were kept, and why."""
        with refusing(None):
            require_prunable(self._renderer, "inspect")
            _check_medium(body)
            question = self._question(body)
        found = await self._inspector.run(body, question, request)
        if isinstance(found, Response):
            return found
        kv_cache = self._bytes(found.usage.seen, found.usage.kept)
        boxes = self._renderer.mm_processor.boxes
        # In a thread: the pictures of many frames take a while.
        return await asyncio.to_thread(
            inspected_reply.reply, found, boxes, self._methods, kv_cache, pictures=body.pictures
        )

    def _question(self, body: InspectRequest) -> Question | None:
        """Return how a question is answered; raise the same errors as a chat request with it."""
        request = PruningRequest.parse(PruningFields(escalate=body.visual_token_escalate))
        admit(self._renderer, request)
        if not (body.text and body.answer):
            if request.asks_again:
                escalation_refusals.refuse("there is no question to be answered (text)")
            return None
        reason = escalation_refusals.unsupported_reason(self._renderer.model_config)
        again = escalation_in_force(self._settings, request)
        return Question(self._settings.escalate_window, reason is None, again, body.visual_token_escalate)

    def _limits(self) -> Limits:
        policies = self._settings.media_policy()
        policy = policies.images
        return Limits(
            **_range(policy),
            videos=Range(**_range(policies.videos)),
            low=policy.low,
            out_of_range=policy.out_of_range,
            floor=policy.floor,
            detail=self._settings.detail,
        )

    @cached_property
    def _methods(self) -> list[Method]:
        calibration = families.calibration(self._renderer.model_config)
        selectors = [self._settings.selector(calibration, name) for name in self._settings.allowed]
        kinds = () if unsupported_reason(self._renderer) else self._renderer.mm_processor.kinds
        return [
            Method(
                name=method.name,
                options=options_of(method),
                over_frames=method.over_frames,
                prunes=[kind for kind in kinds if kind == VIDEO or not method.over_frames],
            )
            for method in selectors
        ]

    def _bytes(self, seen: int, kept: int) -> CacheBytes | None:
        each = self._bytes_per_token
        if each is None:
            return None
        return CacheBytes(bytes_per_token=each, seen=seen * each, kept=kept * each, saved=(seen - kept) * each)

    @cached_property
    def _bytes_per_token(self) -> int | None:
        return bytes_per_token(self._renderer.config)


def _check_medium(body: InspectRequest) -> None:
    """Raise ``BudgetError`` unless there is one image or one video."""
    wrong = None
    if (body.image is None) == (body.video is None):
        wrong = "Send one image as `image`, or one video as `video`."
    elif (body.image or "")[: len(_VIDEO_URL)].lower() == _VIDEO_URL:
        wrong = "This is a video: send it as `video`, not as `image`."
    if wrong:
        raise BudgetError(wrong, param="image")
    if body.video is not None and body.detail is not None:
        raise BudgetError("detail is for images: leave it out with a video.", param="detail")


def _range(policy: BudgetPolicy) -> dict[str, Any]:
    default = "full" if policy.default is None else policy.default.printed()
    return {"default": default, "min": policy.minimum, "max": policy.maximum}
