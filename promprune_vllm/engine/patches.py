"""Every function of vLLM that we replace, wrap or add: one row each. Each points to its seam.

Only ``install`` applies rows, and ``patching.wrap`` takes only a row, so the list is complete. The rows of a stage
are installed from top to bottom; if two rows have the same target, the lower one wraps the upper one.
"""

from __future__ import annotations

from collections.abc import Iterator

from promprune_vllm.engine.compat import reasons
from promprune_vllm.engine.compat.parts import Part
from promprune_vllm.engine.compat.patching import Patch, Reason, Stage, wrap
from promprune_vllm.engine.compat.seam import Seam
from promprune_vllm.engine.compat.seams import SEAMS
from promprune_vllm.engine.keys import CACHE_SIZE_METHOD, TRACES_METHOD

_RENDERER = "vllm.renderers.base:BaseRenderer"
_ONLINE = "vllm.renderers.online_renderer:OnlineRenderer"
_ASYNC = "vllm.v1.engine.async_llm:AsyncLLM"
_LAUNCH = "vllm.entrypoints.launchers"
_PROCESSOR = "vllm.multimodal.processing.processor:BaseMultiModalProcessor"
_INPUTS = "vllm.v1.engine.input_processor:InputProcessor"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_WORKER = "vllm.v1.worker.worker_base:WorkerBase"
_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2 = "vllm.v1.worker.gpu"
_ENTRY = "vllm.entrypoints"
_RESPONSES = f"{_ENTRY}.openai.responses.serving:OpenAIServingResponses"
_POOLING = f"{_ENTRY}.pooling.base.serving:PoolingBaseServing"
_INIT_ENDPOINTS = "api_server.app_hooks:init_endpoints"
_INIT_STATE = "app_state:init_endpoint_plugins_state"
_MEDIA = "vllm.multimodal.media"
_ENGINE = "vllm.v1.engine.llm_engine:LLMEngine"
_STRIP = "vllm.v1.core.sched.output:strip_covered_mm_data"
_SPACES = "vllm.tokenizers.detokenizer_utils:_restore_leading_spaces"
_PRUNING_FLAG = "vllm.v1.worker.cpu_model_runner:CPUModelRunner.is_multimodal_pruning_enabled"
_HOOKS, _FILL_USAGE = "api_server.request_hooks", "api_server.usage_fields:fill_in_usage"
_MONITOR, _ISOLATION, _MINORS = "api_server.load_monitor", "worker.fault_isolation", "compat.older_minors"


_VERSION = "importlib.metadata:version"
_PATCHED = {(seam.part, seam.name): seam for seam in SEAMS if seam.use in ("wrap", "add")}


def _seam(part: Part, target: str) -> Seam:
    """Return a target's seam; of a constructor that a class inherits, the seam of the class."""
    return _PATCHED.get((part, target)) or _PATCHED[part, target.removesuffix(".__init__")]


def _rows(stage: Stage, reason: Reason, *rows: tuple[str, str], only_if_loaded: bool = False) -> Iterator[Patch]:
    """Yield patches of one stage and reason; each row is a target and a wrapper."""
    for target, wrapper in rows:
        yield Patch(target, wrapper, _seam(reason.part, target), stage, reason, only_if_loaded)


PATCHES: tuple[Patch, ...] = (
    *_rows(
        *(Stage.PLUGIN, reasons.FIELDS),
        (f"{_ONLINE}.preprocess_chat", f"{_HOOKS}:read_request"),
        (f"{_ONLINE}.preprocess_cmpl", f"{_HOOKS}:read_request"),
        (f"{_POOLING}._init_ctx", f"{_HOOKS}:read_pooling_request"),
        (f"{_RENDERER}._process_singleton", f"{_HOOKS}:attach_request"),
        (f"{_RENDERER}._process_singleton_async", f"{_HOOKS}:attach_request"),
        (f"{_RENDERER}.__init__", f"{_HOOKS}:prepare_renderer"),
    ),
    *_rows(
        *(Stage.PLUGIN, reasons.HARMONY),
        (f"{_ONLINE}.adjust_harmony_request", f"{_HOOKS}:refuse_harmony"),
        (f"{_ONLINE}._make_request_with_harmony", f"{_HOOKS}:refuse_harmony"),
        (f"{_ONLINE}._render_responses_with_harmony", f"{_HOOKS}:refuse_harmony"),
        (f"{_RESPONSES}._make_request_with_harmony", f"{_HOOKS}:refuse_harmony"),
    ),
    *_rows(
        *(Stage.PLUGIN, reasons.CLIENT_ERROR),
        (f"{_MEDIA}.connector:MediaConnector._load_file_url", f"{_HOOKS}:convert_file_errors"),
        (f"{_MEDIA}.image:ImageMediaIO.load_bytes", f"{_HOOKS}:convert_bomb_errors"),
    ),
    *_rows(
        *(Stage.PLUGIN, reasons.COUNT),
        (f"{_INPUTS}.__init__", "api_server.prompt_metrics:start_counting"),
        (f"{_INPUTS}.process_inputs", "api_server.prompt_metrics:count_prompts"),
    ),
    *_rows(
        *(Stage.PLUGIN, reasons.CONTAIN),
        ("vllm.config.scheduler:SchedulerConfig.get_scheduler_cls", "scheduler.failed_images:patch_scheduler"),
    ),
    *_rows(*(Stage.PLUGIN, reasons.PREEMPTION), (_STRIP, "vllm_fixes.preemption:keep_mm_data")),
    *_rows(
        *(Stage.PLUGIN, reasons.RESENDING),
        (f"{_RENDERER}._process_singleton_async", "vllm_fixes.resending:remember_prompt"),
        (f"{_ASYNC}.generate", "vllm_fixes.resending:resend_on_cache_miss"),
    ),
    *_rows(
        *(Stage.PLUGIN, reasons.FEATURES),
        (f"{_ASYNC}.generate", "api_server.rendered_features:record_prompt"),
        (f"{_ASYNC}.encode", "api_server.rendered_features:record_prompt"),
    ),
    *_rows(
        *(Stage.PLUGIN, reasons.ESCALATION),
        (f"{_RENDERER}._process_singleton_async", "api_server.escalation:remember_second_try"),
        (f"{_ASYNC}.generate", "api_server.escalation:ask_again_if_unsure"),
    ),
    *_rows(*(Stage.PLUGIN, reasons.WAIT), (f"{_ASYNC}.generate", "api_server.first_tokens:observe_first_tokens")),
    *_rows(
        *(Stage.AUDIT, reasons.AUDIT),
        (f"{_RENDERER}._process_singleton_async", "api_server.audit:draw_audits"),
        (f"{_ASYNC}.generate", "api_server.audit:audit_answers"),
    ),
    *_rows(*(Stage.PLUGIN, reasons.USAGE), (f"{_ONLINE}.__init__", "api_server.usage_fields:prepare_usage_types")),
    *_rows(*(Stage.PLUGIN, reasons.NAMES), (_SPACES, "vllm_fixes.token_names:allow_unnamed_tokens")),
    *_rows(
        *(Stage.PLUGIN, reasons.ROUTES),
        # Patched where the servers import them, so other callers still get vLLM's functions.
        (f"{_LAUNCH}.app:attach_endpoint_plugins", "api_server.app_hooks:attach_endpoints"),
        (f"{_LAUNCH}.api_server.{_INIT_STATE}", _INIT_ENDPOINTS),
        (f"{_LAUNCH}.render.{_INIT_STATE}", _INIT_ENDPOINTS),
    ),
    *_rows(
        *(Stage.LOAD, reasons.LOAD),
        (f"{_ASYNC}.__init__", f"{_MONITOR}:require_statistics"),
        (f"{_ENGINE}.__init__", f"{_MONITOR}:require_statistics"),
        ("vllm.v1.metrics.loggers:StatLoggerManager.record", f"{_MONITOR}:record_statistics"),
    ),
    *_rows(
        *(Stage.REFUSAL, reasons.REFUSAL),
        ("vllm.engine.arg_utils:EngineArgs.create_engine_config", "api_server.postponed_errors:raise_postponed"),
    ),
    *_rows(
        *(Stage.REPLIES, reasons.USAGE),
        (f"{_ENTRY}.serve.engine.protocol:UsageInfo.__init__", _FILL_USAGE),
        (
            f"{_ENTRY}.serve.engine.protocol:PromptTokenUsageInfo.__init__",
            "api_server.usage_fields:count_second_try",
        ),
        (f"{_ENTRY}.openai.responses.protocol:ResponseUsage.__init__", _FILL_USAGE),
        (f"{_ENTRY}.anthropic.protocol:AnthropicUsage.__init__", _FILL_USAGE),
        (f"{_ENTRY}.pooling.scoring.protocol:RerankUsage.__init__", _FILL_USAGE),
        (f"{_ENTRY}.generate.structured_decisions.protocol:DecisionUsage.__init__", _FILL_USAGE),
    ),
    *_rows(
        *(Stage.REPLIES, reasons.BATCH),
        (f"{_LAUNCH}.run_batch:run_request", "api_server.usage_fields:record_batch_line"),
        only_if_loaded=True,
    ),
    *_rows(
        *(Stage.SCHEDULER, reasons.CONTAIN),
        (f"{_SCHEDULER}.update_from_output", "scheduler.failed_images:end_failed_requests"),
        (f"{_SCHEDULER}.finish_requests", "scheduler.failed_images:record_aborts"),
    ),
    *_rows(
        *(Stage.WORKER_V1, reasons.CONTAIN),
        (f"{_V1}.execute_model", f"{_ISOLATION}:contain_step"),
        (f"{_V1}.sample_tokens", f"{_ISOLATION}:report_failed"),
    ),
    *_rows(
        *(Stage.WORKER_V2, reasons.CONTAIN),
        (f"{_V2}.model_runner:GPUModelRunner.execute_model", f"{_ISOLATION}:contain_step"),
        (f"{_V2}.model_runner:GPUModelRunner.sample_tokens", f"{_ISOLATION}:report_failed"),
        (f"{_V2}.mm.encoder_runner:EncoderRunner.prepare_mm_inputs", f"{_ISOLATION}:drop_filler"),
    ),
    *_rows(
        *(Stage.WORKER, reasons.GRAPHS),
        (
            "vllm.v1.worker.encoder_cudagraph:EncoderCudaGraphManager.execute",
            "worker.encoder_graphs:leave_out_pruned",
        ),
    ),
    *_rows(
        *(Stage.WORKER, reasons.FORGET),
        # Not by runner: with Model Runner V2, an engine that only encodes has one of V1's kind.
        (f"{_V1}.reset_encoder_cache", "worker.feature_store:clear_with_encoder_cache"),
        (
            f"{_V2}.model_runner:GPUModelRunner.reset_encoder_cache",
            "worker.feature_store:clear_with_encoder_cache",
        ),
        only_if_loaded=True,
    ),
    *_rows(
        *(Stage.WORKER_V1, reasons.LOOKAHEAD), (f"{_V1}._gather_mm_embeddings", "worker.mrope:remember_lookahead")
    ),
    *_rows(
        *(Stage.WORKER_V2, reasons.DELTA),
        (f"{_V2}.mm.rope:RopeState.read_prefill_positions", "worker.mrope:remember_delta"),
    ),
    *_rows(
        *(Stage.WORKER, reasons.INSPECT),
        (f"{_WORKER}.{CACHE_SIZE_METHOD}", "worker.selection_trace:add_encoder_cache_size"),
        (f"{_WORKER}.{TRACES_METHOD}", "worker.selection_trace:add_selection_traces"),
    ),
    *_rows(
        *(Stage.WORKER_CPU, reasons.SEED),
        (f"{_V1}._sample", "vllm_fixes.cpu_seeds:save_states"),
        (f"{_V1}._bookkeeping_sync", "vllm_fixes.cpu_seeds:restore_states"),
    ),
    *_rows(*(Stage.MROPE_CPU, reasons.MROPE), (_PRUNING_FLAG, "worker.mrope:add_pruning_flag")),
    *_rows(
        *(Stage.PROCESSOR, reasons.KEY),
        (f"{_PROCESSOR}._get_mm_hashes", f"{_MINORS}:add_mm_hashes"),
        (f"{_PROCESSOR}._get_cache_missing_processor_kwargs", f"{_MINORS}:add_missing_kwargs"),
        (f"{_PROCESSOR}._cached_apply_hf_processor", f"{_MINORS}:use_processor_hashes"),
        (f"{_PROCESSOR}._get_cache_missing_items", f"{_MINORS}:use_processor_options"),
    ),
    *_rows(
        *(Stage.PROCESSOR, reasons.PROFILE),
        (f"{_PROCESSOR}.get_dummy_inputs", f"{_MINORS}:add_dummy_inputs"),
        (f"{_PROCESSOR}.__init__", f"{_MINORS}:redirect_dummy_inputs"),
    ),
    # Not of vLLM, so not among the seams.
    Patch(
        _VERSION,
        "api_server.command_line:allow_cpu_build",
        Seam(_VERSION, "wrap", ("distribution_name",), part=reasons.COMMAND.part),
        Stage.COMMAND,
        reasons.COMMAND,
    ),
)


def install(stage: Stage) -> None:
    """Apply the rows of a stage that exist in this vLLM. Idempotent.

    Raises:
        IncompatibleVllmError: A target does not match its row. Then no row of the stage is applied.
    """
    patches = [patch for patch in PATCHES if patch.stage is stage and patch.applies]
    for patch in patches:
        patch.require()
    for patch in patches:
        wrap(patch)
