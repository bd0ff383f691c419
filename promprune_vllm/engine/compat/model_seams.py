"""What this release depends on in vLLM's model files, family by family."""

from __future__ import annotations

from promprune_vllm.engine.compat import parts
from promprune_vllm.engine.compat.seam import Seam, add, call, of, rely, wrap

_MODELS = "vllm.model_executor.models"
_LLAVA = f"{_MODELS}.llava"
_NEXT = f"{_MODELS}.llava_next"
_NEXT_MODEL = f"{_NEXT}:LlavaNextForConditionalGeneration"
_ONEVISION = f"{_MODELS}.llava_onevision"
_ONEVISION_MODEL = f"{_ONEVISION}:LlavaOnevisionForConditionalGeneration"
_NEXT_VIDEO = f"{_MODELS}.llava_next_video"
_NEXT_VIDEO_MODEL = f"{_NEXT_VIDEO}:LlavaNextVideoForConditionalGeneration"
_QWEN2 = f"{_MODELS}.qwen2_vl"
_QWEN2_MODEL = f"{_QWEN2}:Qwen2VLForConditionalGeneration"
_QWEN2_5 = f"{_MODELS}.qwen2_5_vl"
_QWEN2_5_MODEL = f"{_QWEN2_5}:Qwen2_5_VLForConditionalGeneration"
_QWEN3 = f"{_MODELS}.qwen3_vl"
_QWEN3_MODEL = f"{_QWEN3}:Qwen3VLForConditionalGeneration"
_INTERN_CHAT = f"{_MODELS}.internvl"
_INTERN = f"{_MODELS}.interns1"
_GLM = f"{_MODELS}.glm4_1v"
_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_PRUNER = "vllm.v1.worker.gpu.model_states.mm_pruning:MultiModalPruner"
_ROPE_STATE = "vllm.v1.worker.gpu.mm.rope:RopeState"
_ROTARY = "vllm.model_executor.layers.rotary_embedding.mrope:MRotaryEmbedding"
_PINNED = "vllm.utils.platform_utils:is_pin_memory_available"
_TOWER = ("x", "grid_thw")
_SIZE = ("image_width", "image_height", "image_processor", "mm_kwargs")
_POSITIONS = ("input_tokens", "mm_features")
_OPTIONS = "vllm.multimodal.processing.context:InputProcessingContext.get_merged_mm_kwargs"

MODEL_SEAMS: tuple[Seam, ...] = (
    *of(
        parts.CLIP,
        call(f"{_MODELS}.clip:CLIPAttention.forward", "hidden_states", body=True),
        rely(f"{_MODELS}.clip:CLIPEncoderLayer.forward", body=True),
        rely(f"{_MODELS}.clip:CLIPVisionTransformer.forward", body=True),
        rely(f"{_LLAVA}:LlavaMultiModalProjector.forward", body=True),
        call(f"{_LLAVA}:LlavaDummyInputsBuilder"),
    ),
    *of(
        parts.LLAVA,
        call(f"{_LLAVA}:LlavaForConditionalGeneration.embed_multimodal", body=True),
        rely(f"{_LLAVA}:LlavaForConditionalGeneration._process_image_input", body=True),
        rely(f"{_LLAVA}:LlavaForConditionalGeneration._image_pixels_to_features", body=True),
        rely(f"{_LLAVA}:BaseLlavaProcessingInfo.get_num_image_tokens", body=True),
        rely(f"{_LLAVA}:BaseLlavaMultiModalProcessor._get_prompt_updates", body=True),
        call(f"{_LLAVA}:LlavaMultiModalProcessor"),
        call(f"{_LLAVA}:_build_llava_or_pixtral_hf_info", "ctx"),
        call(f"{_LLAVA}:_build_llava_or_pixtral_hf_processor", "info", "dummy_inputs"),
    ),
    *of(
        parts.LLAVA_NEXT,
        call(f"{_NEXT}:LlavaNextMultiModalProcessor"),
        call(f"{_NEXT}:LlavaNextProcessingInfo.get_num_image_tokens", "image_width", "image_height", body=True),
        call(f"{_NEXT_MODEL}._image_pixels_to_features", "vision_tower", "pixel_values", body=True),
        call(
            f"{_NEXT_MODEL}._merge_image_patch_embeddings",
            *("image_size", "patch_embeddings", "strategy"),
            body=True,
        ),
        rely(f"{_NEXT_MODEL}._process_image_pixels", body=True),
        rely(f"{_NEXT_MODEL}._process_image_input", body=True),
        rely(f"{_NEXT_MODEL}.embed_multimodal", body=True),
        call(_PINNED),
    ),
    *of(
        parts.LLAVA_ONEVISION,
        call(f"{_ONEVISION}:LlavaOnevisionMultiModalProcessor"),
        call(f"{_ONEVISION}:LlavaOnevisionDummyInputsBuilder"),
        call(f"{_NEXT}:LlavaNextProcessingInfo.get_num_image_tokens", "image_width", "image_height", body=True),
        rely(f"{_ONEVISION}:LlavaOnevisionProcessingInfo._get_num_unpadded_features", body=True),
        rely(f"{_ONEVISION}:LlavaOnevisionProcessingInfo.get_num_video_tokens", body=True),
        rely(f"{_ONEVISION}:LlavaOnevisionMultiModalProcessor._apply_hf_processor_main", body=True),
        rely(f"{_ONEVISION}:LlavaOnevisionMultiModalProcessor._get_prompt_updates", body=True),
        call(f"{_ONEVISION_MODEL}._image_pixels_to_features", "vision_tower", "pixel_values", body=True),
        call(
            f"{_ONEVISION_MODEL}._merge_image_patch_embeddings",
            *("image_size", "patch_embeddings", "image_newline", "strategy"),
            body=True,
        ),
        call(f"{_ONEVISION_MODEL}.apply_pooling", "image_features", body=True),
        rely(f"{_ONEVISION_MODEL}._process_image_pixels", body=True),
        rely(f"{_ONEVISION_MODEL}._process_image_input", body=True),
        rely(f"{_ONEVISION_MODEL}._process_video_pixels", body=True),
        rely(f"{_ONEVISION_MODEL}._video_pixels_to_features", body=True),
        rely(f"{_ONEVISION_MODEL}.embed_multimodal", body=True),
        rely(f"{_ONEVISION}:LlavaOnevisionMultiModalProjector.forward", body=True),
        call(f"{_MODELS}.siglip:SiglipAttention.forward", "hidden_states", body=True),
        rely(f"{_MODELS}.siglip:SiglipEncoderLayer.forward", body=True),
        rely(f"{_MODELS}.siglip:SiglipVisionTransformer.forward", body=True),
        call(_PINNED),
    ),
    *of(
        parts.LLAVA_NEXT_VIDEO,
        call(f"{_NEXT_VIDEO}:LlavaNextVideoMultiModalProcessor"),
        call(f"{_NEXT_VIDEO}:LlavaNextVideoProcessingInfo"),
        call(f"{_NEXT_VIDEO}:LlavaNextVideoDummyInputsBuilder"),
        rely(f"{_NEXT_VIDEO}:LlavaNextVideoProcessingInfo.get_num_video_tokens", body=True),
        rely(f"{_NEXT_VIDEO}:LlavaNextVideoMultiModalProcessor._get_prompt_updates", body=True),
        call(f"{_NEXT_VIDEO}:LlavaNextVideoPooler.forward", "image_features", body=True),
        call(f"{_NEXT_VIDEO_MODEL}._video_pixels_to_features", "vision_tower", "pixel_values", body=True),
        rely(f"{_NEXT_VIDEO_MODEL}._process_video_pixels", body=True),
        rely(f"{_NEXT_VIDEO_MODEL}.embed_multimodal", body=True),
        rely(f"{_NEXT_VIDEO}:LlavaNextMultiModalProjector.forward", body=True),
    ),
    *of(
        parts.MROPE,
        call(f"{_MODELS}.vision:get_load_balance_assignment", "sizes", "num_gpus", body=True),
        call("vllm.distributed.parallel_state:GroupCoordinator.broadcast", "input_", "src"),
        call("vllm.config.multimodal:MultiModalConfig.is_multimodal_pruning_enabled", body=True),
        call("vllm.multimodal.inputs:MultiModalFeatureSpec", "mm_position", "modality", "data"),
        call("vllm.multimodal.inputs:PlaceholderRange", "offset", "length"),
        wrap(f"{_V1}._gather_mm_embeddings", "scheduler_output", "shift_computed_tokens", body=True),
        call(f"{_PRUNER}.recompute", "mm_embeds", body=True),
        rely(f"{_PRUNER}.strip", body=True),
        wrap(f"{_ROPE_STATE}.read_prefill_positions", "req_idx", "length", body=True),
        rely(f"{_ROPE_STATE}.init_prefill_positions", body=True),
        rely(f"{_ROPE_STATE}.update_prefill_positions", body=True),
        rely("vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner.gather_mm_embeddings", body=True),
        call(f"{_ROTARY}._compute_inv_freq", "base"),
        add("vllm.v1.worker.cpu_model_runner:CPUModelRunner.is_multimodal_pruning_enabled"),
    ),
    *of(
        parts.QWEN2_VL,
        call(f"{_QWEN2}:Qwen2VLMultiModalProcessor"),
        call(f"{_QWEN2}:Qwen2VLProcessingInfo.get_num_image_tokens", "image_processor", "mm_kwargs", body=True),
        call(f"{_QWEN2}:Qwen2VLProcessingInfo._get_vision_info", *_SIZE, body=True),
        call(f"{_QWEN2_MODEL}.get_mrope_input_positions", *_POSITIONS, body=True),
        rely(f"{_QWEN2_MODEL}.iter_mm_grid_thw", body=True),
        rely(f"{_QWEN2_MODEL}._process_image_input", body=True),
        rely(f"{_QWEN2_MODEL}._process_video_input", body=True),
        rely(f"{_QWEN2_MODEL}.embed_multimodal", body=True),
        rely(f"{_QWEN2}:Qwen2VLMultiModalProcessor._get_prompt_updates", body=True),
        rely(f"{_QWEN2}:Qwen2VisionAttention.forward", body=True),
        call(f"{_QWEN2}:Qwen2VisionTransformer.forward", *_TOWER, body=True),
        call(f"{_QWEN2}:Qwen2VisionPatchMerger.forward", "x", body=True),
    ),
    *of(
        parts.QWEN2_5_VL,
        call(f"{_QWEN2_5}:Qwen2_5_VLMultiModalProcessor"),
        call(f"{_QWEN2}:Qwen2VLProcessingInfo._get_vision_info", *_SIZE, body=True),
        call(f"{_QWEN2_5_MODEL}.get_mrope_input_positions", *_POSITIONS, body=True),
        call(
            f"{_QWEN2_5_MODEL}.recompute_mrope_positions",
            *("input_ids", "multimodal_embeddings", "mrope_positions", "num_computed_tokens"),
        ),
        rely(f"{_QWEN2_5_MODEL}._process_image_input", body=True),
        rely(f"{_QWEN2_5_MODEL}._process_video_input", body=True),
        rely(f"{_QWEN2_5_MODEL}.embed_multimodal", body=True),
        rely(f"{_QWEN2_5}:Qwen2_5_VLMultiModalProcessor._get_prompt_updates", body=True),
        rely(f"{_QWEN2_5}:Qwen2_5_VisionAttention.forward", body=True),
        call(f"{_QWEN2_5}:Qwen2_5_VisionTransformer.forward", *_TOWER, body=True),
        call(
            f"{_QWEN2_5}:Qwen2_5_VisionTransformer.get_window_index_thw",
            *("grid_t", "grid_h", "grid_w"),
            body=True,
        ),
        rely(f"{_QWEN2_5}:Qwen2_5_VisionPatchMerger.forward", body=True),
        call(_PINNED),
    ),
    *of(
        parts.QWEN3_VL,
        call(f"{_QWEN3}:Qwen3VLMultiModalProcessor"),
        call(f"{_QWEN3}:Qwen3VLProcessingInfo._get_vision_info", *_SIZE, body=True),
        call(f"{_QWEN3_MODEL}.get_mrope_input_positions", *_POSITIONS, body=True),
        rely(f"{_QWEN3_MODEL}._get_mrope_input_positions", body=True),
        rely(f"{_QWEN3_MODEL}._process_image_input", body=True),
        rely(f"{_QWEN3_MODEL}._process_video_input", body=True),
        rely(f"{_QWEN3_MODEL}.embed_multimodal", body=True),
        call(f"{_QWEN3_MODEL}._compute_deepstack_embeds", "multimodal_embeddings", body=True),
        rely(f"{_QWEN3}:Qwen3VLMultiModalProcessor._get_prompt_updates", body=True),
        rely(f"{_QWEN3}:Qwen3VLMultiModalProcessor._apply_hf_processor_main", body=True),
        rely(f"{_QWEN3}:Qwen3VLMultiModalProcessor.get_video_repl", body=True),
        call(f"{_QWEN3}:Qwen3_VisionTransformer.forward", *_TOWER, body=True),
        call(f"{_QWEN3}:Qwen3_VisionPatchMerger.forward", "x", body=True),
    ),
    *of(
        parts.QWEN3_VL_MOE,
        call(f"{_QWEN3}_moe:Qwen3VLMoeProcessingInfo"),
        call(f"{_QWEN3}_moe:Qwen3VLMoeForConditionalGeneration"),
        rely(f"{_QWEN3}_moe:Qwen3MoeLLMModel.forward", body=True),
    ),
    *of(
        parts.QWEN3_5,
        call(f"{_MODELS}.qwen3_5:Qwen3_5ProcessingInfo"),
        call(f"{_MODELS}.qwen3_5:Qwen3_5MoeProcessingInfo"),
        call(f"{_MODELS}.qwen3_5:Qwen3_5ForConditionalGeneration"),
        call(f"{_MODELS}.qwen3_5:Qwen3_5MoeForConditionalGeneration"),
        rely(f"{_MODELS}.qwen3_5:Qwen3_5ForConditionalGeneration.embed_input_ids", body=True),
    ),
    *of(
        parts.INTERNVL_CHAT,
        call(f"{_INTERN_CHAT}:InternVLMultiModalProcessor"),
        call(f"{_INTERN_CHAT}:InternVLDummyInputsBuilder"),
        call(f"{_INTERN_CHAT}:InternVLProcessingInfo.get_hf_processor"),
        call(f"{_INTERN_CHAT}:InternVLChatModel.extract_feature", "pixel_values", body=True),
        rely(f"{_INTERN_CHAT}:InternVLChatModel._process_vision_input", body=True),
        rely(f"{_INTERN_CHAT}:InternVLChatModel.embed_multimodal", body=True),
        rely(f"{_INTERN_CHAT}:InternVLChatModel.pixel_shuffle", body=True),
        rely(f"{_INTERN_CHAT}:InternVLMultiModalProcessor._get_prompt_updates", body=True),
        rely(f"{_INTERN_CHAT}:BaseInternVLMultiModalProcessor._get_prompt_repl_image", body=True),
        rely(f"{_INTERN_CHAT}:InternVLMultiModalProcessor._get_prompt_repl_video", body=True),
        call(
            f"{_INTERN_CHAT}:BaseInternVLProcessingInfo.get_num_image_tokens", *_SIZE[:2], "processor", body=True
        ),
        call(
            "vllm.transformers_utils.processors.internvl:calculate_internvl_targets",
            *("orig_width", "orig_height", "target_ratios", "image_size", "use_thumbnail"),
            body=True,
        ),
        rely(f"{_MODELS}.intern_vit:InternVisionModel.forward", body=True),
        rely(f"{_MODELS}.intern_vit:InternParallelAttention.forward", body=True),
        rely(f"{_MODELS}.vision:run_dp_sharded_vision_model", body=True),
        call("vllm.distributed.parallel_state:GroupCoordinator.broadcast", "input_", "src"),
        call(_PINNED),
    ),
    *of(
        parts.INTERNVL,
        call(f"{_INTERN}:InternS1MultiModalProcessor"),
        call(f"{_INTERN}:InternS1DummyInputsBuilder"),
        call(f"{_INTERN}:InternS1ProcessingInfo.get_hf_processor", body=True),
        call(_OPTIONS, "kwargs"),
        call(f"{_INTERN}:InternS1ForConditionalGeneration.extract_feature", "pixel_values", body=True),
        rely(f"{_INTERN}:InternS1ForConditionalGeneration._process_vision_input", body=True),
        rely(f"{_INTERN}:InternS1ForConditionalGeneration.embed_multimodal", body=True),
        rely(f"{_INTERN}:InternS1ForConditionalGeneration.pixel_shuffle", body=True),
        rely(f"{_INTERN}:InternS1MultiModalProcessor._get_prompt_updates", body=True),
        rely(f"{_MODELS}.interns1_vit:InternS1VisionModel.forward", body=True),
        rely(f"{_MODELS}.interns1_vit:InternSdpaAttention.forward", body=True),
        call(_PINNED),
    ),
    *of(
        parts.GLM4V,
        call(f"{_GLM}:Glm4vMultiModalProcessor"),
        call(f"{_GLM}:Glm4vDummyInputsBuilder"),
        call(f"{_GLM}:Glm4vProcessingInfo.get_image_processor"),
        call(_OPTIONS, "kwargs"),
        call(f"{_GLM}:Glm4vForConditionalGeneration.get_mrope_input_positions", *_POSITIONS, body=True),
        rely(f"{_GLM}:Glm4vForConditionalGeneration.iter_mm_grid_thw", body=True),
        rely(f"{_GLM}:Glm4vForConditionalGeneration._process_image_input", body=True),
        rely(f"{_GLM}:Glm4vForConditionalGeneration._process_video_input", body=True),
        rely(f"{_GLM}:Glm4vProcessingInfo._construct_video_placeholder", body=True),
        rely(f"{_GLM}:Glm4vForConditionalGeneration.embed_multimodal", body=True),
        rely(f"{_GLM}:Glm4vMultiModalProcessor._get_prompt_updates", body=True),
        rely(f"{_GLM}:Glm4vVisionAttention.forward", body=True),
        call(f"{_GLM}:Glm4vVisionTransformer.forward", *_TOWER, body=True),
        call(f"{_GLM}:Glm4vPatchMerger.forward", "x", body=True),
        call(f"{_GLM}:Glm4vMoeForConditionalGeneration"),
    ),
    *of(
        parts.GLM_OCR,
        call(f"{_MODELS}.glm_ocr:GlmOcrForConditionalGeneration"),
        rely(f"{_MODELS}.glm_ocr:GlmOcrVisionAttention.forward", body=True),
        call(f"{_MODELS}.glm_ocr:GlmOcrVisionTransformer.forward", *_TOWER, body=True),
    ),
)
