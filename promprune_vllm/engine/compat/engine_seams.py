"""What this release depends on in vLLM outside its model files: the API server, the scheduler and the worker."""

from __future__ import annotations

from promprune_vllm.engine.compat import parts
from promprune_vllm.engine.compat.seam import Seam, add, call, of, rely, wrap
from promprune_vllm.engine.keys import CACHE_SIZE_METHOD, TRACES_METHOD

_PROCESSING = "vllm.multimodal.processing"
_PROCESSOR = f"{_PROCESSING}.processor:BaseMultiModalProcessor"
_RENDERER = "vllm.renderers.base:BaseRenderer"
_ONLINE = "vllm.renderers.online_renderer:OnlineRenderer"
_ENTRY = "vllm.entrypoints"
_CHAT = f"{_ENTRY}.openai.chat_completion.protocol"
_LAUNCH = f"{_ENTRY}.launchers"
_RESPONSES = f"{_ENTRY}.openai.responses.serving:OpenAIServingResponses"
_ASYNC = "vllm.v1.engine.async_llm:AsyncLLM"
_INPUTS = "vllm.v1.engine.input_processor:InputProcessor"
_CLIENT = "vllm.v1.engine.core_client:AsyncMPClient"
_CONFIG = "vllm.config.model:ModelConfig"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_ENCODER_CACHE = "vllm.v1.core.encoder_cache_manager:EncoderCacheManager"
_WORKER = "vllm.v1.worker.worker_base:WorkerBase"
_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2 = "vllm.v1.worker.gpu"
_ENCODER = f"{_V2}.mm.encoder_runner:EncoderRunner"
_ANTHROPIC = f"{_ENTRY}.anthropic.protocol"
_SCORING = f"{_ENTRY}.pooling.scoring.protocol"
_TENSORS = "vllm.utils.torch_utils"

ENGINE_SEAMS: tuple[Seam, ...] = (
    *of(
        parts.REQUESTS,
        wrap(f"{_ONLINE}.preprocess_chat", "request"),
        wrap(f"{_ONLINE}.preprocess_cmpl", "request"),
        wrap(f"{_ENTRY}.pooling.base.serving:PoolingBaseServing._init_ctx", "io_processor", "request"),
        wrap(f"{_RENDERER}._process_singleton", "prompt"),
        wrap(f"{_RENDERER}._process_singleton_async", "prompt"),
        wrap(f"{_RENDERER}.__init__", "config", "tokenizer"),
        call("vllm.exceptions:VLLMValidationError.__init__", "message", "parameter"),
        call(
            f"{_ENTRY}.generate.base.protocol:validate_request_mm_kwargs",
            *("mm_processor_kwargs", "trust_request_mm_kwargs"),
            body=True,
            since="0.31",
        ),
    ),
    *of(
        parts.PROCESSOR,
        call(f"{_PROCESSOR}.apply", "inputs", "timing_ctx", body=True),
        call(f"{_PROCESSOR}._apply_hf_processor_main", "mm_items", "hf_kwargs", body=True, since="0.31"),
        call(
            f"{_PROCESSOR}._apply_hf_processor_main",
            *("mm_items", "hf_processor_mm_kwargs"),
            body=True,
            before="0.31",
        ),
        call(
            f"{_PROCESSOR}._get_cache_missing_processor_kwargs",
            *("inputs", "mm_is_cached"),
            body=True,
            since="0.32",
        ),
        call(f"{_PROCESSOR}._get_mm_fields_config", "hf_inputs", "hf_processor_mm_kwargs"),
        call(f"{_PROCESSOR}._get_mm_hashes", "inputs", body=True, since="0.32"),
        call(f"{_PROCESSOR}.get_dummy_inputs", body=True, since="0.31"),
        call(f"{_PROCESSOR}._get_prompt_updates", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
        rely(f"{_PROCESSOR}._merge_mm_kwargs", body=True),
        rely(f"{_PROCESSOR}._maybe_apply_prompt_updates", body=True),
        rely(f"{_PROCESSOR}._validate_mm_placeholders", body=True),
        rely(f"{_PROCESSING}.processor:find_mm_placeholders", body=True),
        rely(f"{_RENDERER}._process_multimodal", words=("mm_processor_inputs", "mm_processor_kwargs", "cache")),
        call(f"{_PROCESSING}.inputs:ProcessorInputs", "hf_processor_mm_kwargs", "mm_uuid_items"),
        call(f"{_PROCESSING}.inputs:ProcessorInputs", "cache", since="0.31"),
        call("vllm.multimodal.cache.base:BaseMultiModalProcessorCache.is_cached", "mm_hashes", since="0.31"),
        call("vllm.multimodal.cache:BaseMultiModalProcessorCache.is_cached", "mm_hashes", before="0.31"),
        call("vllm.multimodal.inputs:MultiModalFieldConfig.batched", "modality", "keep_on_cpu", body=True),
        call("vllm.multimodal.inputs:MultiModalKwargsItems.from_hf_inputs", "hf_inputs", "config_by_key"),
        call(f"{_PROCESSING}.context:BaseProcessingInfo.parse_mm_data", "mm_data", "validate"),
        call(f"{_PROCESSING}.dummy_inputs:BaseDummyInputsBuilder.get_dummy_text", "mm_counts"),
        call("vllm.multimodal.hasher:MultiModalHasher.hash_kwargs", "algorithm", body=True),
        rely("vllm.multimodal.inputs:PlaceholderRange", body=True),
        call(f"{_PROCESSING}.processor:PromptUpdateDetails", "full", "is_embed", body=True),
        call(f"{_PROCESSING}.inputs:ProcessorInputs.get_mm_hashes", "model_id", "hash_algorithm", before="0.32"),
        call(f"{_PROCESSING}.dummy_inputs:BaseDummyInputsBuilder.get_dummy_processor_inputs", before="0.31"),
        add(f"{_PROCESSOR}._get_mm_hashes", before="0.32"),
        add(f"{_PROCESSOR}._get_cache_missing_processor_kwargs", before="0.32"),
        wrap(f"{_PROCESSOR}._cached_apply_hf_processor", "inputs", "timing_ctx", before="0.32", body=True),
        rely(f"{_PROCESSOR}._cached_apply_hf_processor", since="0.32", body=True),
        wrap(
            f"{_PROCESSOR}._get_cache_missing_items",
            *("cache", "mm_data_items", "mm_hashes"),
            before="0.32",
            body=True,
        ),
        rely(f"{_PROCESSOR}._get_cache_missing_items", since="0.32", body=True),
        add(f"{_PROCESSOR}.get_dummy_inputs", before="0.31"),
        wrap(f"{_PROCESSOR}.__init__", "info", "dummy_inputs", "cache", before="0.31"),
    ),
    *of(
        parts.ROUTES,
        wrap(f"{_LAUNCH}.app:attach_endpoint_plugins", "app", "supported_tasks"),
        wrap(f"{_LAUNCH}.api_server.app_state:init_endpoint_plugins_state", "engine_client", "state", "args"),
        wrap(f"{_LAUNCH}.render.app_state:init_endpoint_plugins_state", "engine_client", "state", "args"),
        call("vllm.multimodal.parse:ImageSize", "width", "height"),
        call(f"{_RENDERER}.mm_processor_cache", "self"),
    ),
    *of(
        parts.WORKER,
        call("vllm.v1.outputs:AsyncModelRunnerOutput.get_output"),
        call("vllm.v1.outputs:ModelRunnerOutput"),
        call("vllm.distributed.parallel_state:get_tp_group"),
        rely(f"{_V1}._batch_mm_inputs_from_scheduler", body=True),
        rely(f"{_V1}._execute_mm_encoder", words=("embed_multimodal", "_cache_encoder_output", "encoder_cache")),
        rely(f"{_ENCODER}.execute_mm_encoder", body=True),
        wrap("vllm.v1.worker.encoder_cudagraph:EncoderCudaGraphManager.execute", "mm_kwargs"),
        call(
            "vllm.model_executor.layers.attention.mm_encoder_attention:MMEncoderAttention",
            *("num_heads", "head_size", "scale", "num_kv_heads"),
        ),
    ),
    *of(
        parts.FAILED_IMAGES,
        wrap("vllm.config.scheduler:SchedulerConfig.get_scheduler_cls"),
        wrap(
            f"{_SCHEDULER}.update_from_output",
            *("scheduler_output", "model_runner_output"),
            words=("model_runner_output",),
        ),
        wrap(f"{_SCHEDULER}.finish_requests", "request_ids", "finished_status", words=("valid_requests",)),
        call("vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks", "block_ids", body=True),
        call("vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids", "request_id", body=True),
        call(f"{_ENCODER_CACHE}.get_freed_mm_hashes"),
        rely(
            _ENCODER_CACHE,
            words=("cached", "freeable", "freed", "num_free_slots", "num_freeable_slots", "num_embeds_by_hash"),
        ),
        call(
            "vllm.v1.engine:EngineCoreOutput",
            *("request_id", "new_token_ids", "finish_reason", "events", "trace_headers"),
        ),
        call("vllm.v1.engine:EngineCoreOutputs", "outputs"),
        call("vllm.v1.request:Request.get_finished_reason"),
        call("vllm.v1.request:Request.take_events"),
        wrap(f"{_V1}.execute_model", "scheduler_output"),
        wrap(f"{_V1}.sample_tokens", "grammar_output"),
        wrap(f"{_V2}.model_runner:GPUModelRunner.execute_model", "scheduler_output"),
        wrap(f"{_V2}.model_runner:GPUModelRunner.sample_tokens", "grammar_output"),
        wrap(f"{_ENCODER}.prepare_mm_inputs", "scheduled_encoder_inputs", body=True),
    ),
    *of(
        parts.FEATURE_CACHE,
        wrap(f"{_V1}.reset_encoder_cache"),
        call(f"{_V1}.get_model"),
        wrap(f"{_V2}.model_runner:GPUModelRunner.reset_encoder_cache"),
        call(f"{_V2}.model_runner:GPUModelRunner.get_model"),
    ),
    *of(
        parts.HARMONY,
        wrap(f"{_ONLINE}.adjust_harmony_request", "request", since="0.31"),
        wrap(f"{_ONLINE}._make_request_with_harmony", "request", before="0.31"),
        wrap(f"{_ONLINE}._render_responses_with_harmony", "request", since="0.30", before="0.31"),
        wrap(f"{_RESPONSES}._make_request_with_harmony", "request", before="0.30"),
    ),
    *of(
        parts.CLIENT_ERRORS,
        wrap("vllm.multimodal.media.connector:MediaConnector._load_file_url", "url_spec", "media_io"),
        wrap("vllm.multimodal.media.image:ImageMediaIO.load_bytes", "data"),
    ),
    *of(
        parts.METRICS,
        wrap(f"{_INPUTS}.__init__", "vllm_config"),
        wrap(f"{_INPUTS}.process_inputs", "request_id", "prompt"),
        wrap(f"{_ASYNC}.generate", "prompt", "sampling_params", "request_id"),
        call("vllm.outputs:RequestOutput", "finished", "metrics"),
        rely("vllm.v1.metrics.stats:RequestStateStats", words=("first_token_ts", "last_token_ts")),
    ),
    *of(
        parts.SAVINGS,
        call(f"{_CONFIG}.get_num_kv_heads", "parallel_config"),
        call(f"{_CONFIG}.get_head_size"),
        call(f"{_TENSORS}:resolve_kv_cache_dtype_string", "kv_cache_dtype", "model_config"),
        call(f"{_TENSORS}:kv_cache_dtype_str_to_dtype", "kv_cache_dtype", "model_config"),
    ),
    *of(
        parts.PREEMPTION,
        wrap("vllm.v1.core.sched.output:strip_covered_mm_data", "mm_features", "num_computed_tokens", body=True),
    ),
    *of(
        parts.RESENDING,
        wrap(f"{_RENDERER}._process_singleton_async", "prompt", "skip_mm_cache"),
        wrap(f"{_ASYNC}.generate", "prompt", "sampling_params", "request_id"),
        # Where vLLM drops the images that the engine lacked: the retry looks whether it did.
        rely(f"{_ASYNC}._run_output_handler", words=("missing_hashes", "mm_processor_cache", "renderer")),
        rely("vllm.multimodal.cache.base:BaseMultiModalProcessorCache.is_cached", since="0.31", body=True),
        call(f"{_RENDERER}.queue_mm_cache_invalidations", "mm_hashes", since="0.33", body=True),
        rely(f"{_RENDERER}._drain_mm_cache_invalidations", since="0.33", body=True),
    ),
    *of(
        parts.RENDERED,
        wrap(f"{_ASYNC}.generate", "prompt"),
        wrap(f"{_ASYNC}.encode", "prompt"),
    ),
    *of(
        parts.ESCALATION,
        wrap(f"{_RENDERER}._process_singleton_async", "prompt"),
        wrap(f"{_ASYNC}.generate", "prompt", "sampling_params", "request_id"),
        call("vllm.outputs:CompletionOutput", "token_ids", "logprobs", "cumulative_logprob", "finish_reason"),
        call("vllm.outputs:RequestOutput", "outputs", "finished"),
        call("vllm.sampling_params:SamplingParams.clone"),
        rely(
            "vllm.sampling_params:SamplingParams",
            words=("n:", "logprobs:", "prompt_logprobs:", "max_tokens:", "output_kind:", "extra_args:"),
        ),
        rely("vllm.sampling_params:RequestOutputKind", body=True),
        call("vllm.logprobs:FlatLogprobs.append", "logprobs_one_position"),
    ),
    *of(
        parts.AUDIT,
        wrap(f"{_RENDERER}._process_singleton_async", "prompt"),
        wrap(f"{_ASYNC}.generate", "prompt", "sampling_params", "request_id", "lora_request", "priority"),
        call("vllm.outputs:CompletionOutput", "token_ids", "logprobs", "cumulative_logprob", "finish_reason"),
        call("vllm.outputs:RequestOutput", "outputs", "finished", "prompt_logprobs"),
        call("vllm.sampling_params:SamplingParams.clone"),
        # What it relies on in sampling parameters is among the seams of escalation.
    ),
    *of(
        parts.USAGE,
        wrap(f"{_ONLINE}.__init__", "model_config", "renderer"),
        wrap(f"{_ENTRY}.serve.engine.protocol:UsageInfo", "prompt_tokens"),
        wrap(f"{_ENTRY}.serve.engine.protocol:PromptTokenUsageInfo", "multimodal_tokens"),
        wrap(f"{_ENTRY}.openai.responses.protocol:ResponseUsage", "input_tokens"),
        wrap(f"{_ANTHROPIC}:AnthropicUsage", "input_tokens"),
        call(f"{_ANTHROPIC}:AnthropicMessagesResponse", "usage"),
        call(f"{_ANTHROPIC}:AnthropicStreamEvent"),
        wrap(f"{_SCORING}:RerankUsage", "prompt_tokens"),
        call(f"{_SCORING}:RerankResponse", "usage"),
        wrap(f"{_ENTRY}.generate.structured_decisions.protocol:DecisionUsage", since="0.32"),
    ),
    *of(parts.REFUSAL, wrap("vllm.engine.arg_utils:EngineArgs.create_engine_config")),
    *of(parts.BATCH, wrap(f"{_LAUNCH}.run_batch:run_request")),
    *of(
        parts.NAMES,
        wrap("vllm.tokenizers.detokenizer_utils:_restore_leading_spaces", "raw_token", "token_str", "marker"),
        rely("vllm.tokenizers.detokenizer_utils:convert_ids_list_to_tokens", words=("_restore_leading_spaces",)),
    ),
    *of(
        parts.LOAD,
        wrap(f"{_ASYNC}.__init__", "vllm_config", "log_stats"),
        wrap("vllm.v1.engine.llm_engine:LLMEngine.__init__", "vllm_config", "log_stats"),
        wrap(
            "vllm.v1.metrics.loggers:StatLoggerManager.record",
            *("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
        ),
        call("vllm.v1.metrics.stats:SchedulerStats", "kv_cache_usage", "num_waiting_reqs"),
    ),
    *of(
        parts.INSPECTOR,
        call(f"{_CHAT}:ChatCompletionRequest", "messages", "cache_salt", "logprobs", "repetition_penalty"),
        call(f"{_CHAT}:ChatCompletionLogProb", "logprob"),
        call(f"{_CHAT}:ChatCompletionResponseChoice", "message", "logprobs"),
        call(
            f"{_ENTRY}.openai.chat_completion.serving:OpenAIServingChat.create_chat_completion",
            *("request", "raw_request"),
        ),
        call(f"{_CLIENT}.call_utility_all_async", "method", since="0.32"),
        call(f"{_CLIENT}._call_utility_async", "method", "engine", before="0.32"),
        call(f"{_ONLINE}.render_chat", "request", "skip_mm_cache"),
        call("vllm.v1.worker.gpu_worker:Worker.get_model"),
        add(f"{_WORKER}.{CACHE_SIZE_METHOD}"),
        add(f"{_WORKER}.{TRACES_METHOD}"),
    ),
    *of(
        parts.SEEDS,
        wrap(f"{_V1}._sample", "logits"),
        wrap(f"{_V1}._bookkeeping_sync", "scheduler_output", words=("generator", "generators", "set_offset")),
    ),
)
