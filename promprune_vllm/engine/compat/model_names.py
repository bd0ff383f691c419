"""Names in vLLM's model files that this plugin relies on. ``versions`` has all others, and checks both."""

from __future__ import annotations

from collections.abc import Mapping

_NEXT = "vllm.model_executor.models.llava_next:LlavaNextForConditionalGeneration"
_MODELS = "vllm.model_executor.models"
_CLIP_ATTENTION = f"{_MODELS}.clip:CLIPAttention.forward"
LLAVA_NAMES: Mapping[str, tuple[str, ...]] = {
    f"{_MODELS}.llava:LlavaForConditionalGeneration.embed_multimodal": (),
    f"{_MODELS}.llava:LlavaMultiModalProcessor": ("info", "dummy_inputs"),
    f"{_MODELS}.llava:LlavaDummyInputsBuilder": (),
    f"{_MODELS}.llava:_build_llava_or_pixtral_hf_info": ("ctx",),
    f"{_MODELS}.llava:_build_llava_or_pixtral_hf_processor": ("info", "dummy_inputs"),
    _CLIP_ATTENTION: ("hidden_states",),
}
LLAVA_NEXT_NAMES: Mapping[str, tuple[str, ...]] = {
    f"{_MODELS}.llava:LlavaDummyInputsBuilder": (),
    f"{_MODELS}.llava_next:LlavaNextMultiModalProcessor": ("info", "dummy_inputs"),
    f"{_MODELS}.llava_next:LlavaNextProcessingInfo.get_num_image_tokens": (
        "image_width",
        "image_height",
    ),
    f"{_NEXT}._image_pixels_to_features": ("vision_tower", "pixel_values"),
    f"{_NEXT}._merge_image_patch_embeddings": ("image_size", "patch_embeddings", "strategy"),
    _CLIP_ATTENTION: ("hidden_states",),
}
MROPE_NAMES: Mapping[str, tuple[str, ...]] = {
    f"{_MODELS}.vision:get_load_balance_assignment": ("sizes", "num_gpus"),
    "vllm.distributed.parallel_state:GroupCoordinator.broadcast": ("input_", "src"),
    "vllm.config:MultiModalConfig.is_multimodal_pruning_enabled": (),
    "vllm.multimodal.inputs:MultiModalFeatureSpec": ("mm_position", "modality", "data"),
    "vllm.multimodal.inputs:PlaceholderRange": ("offset", "length"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._gather_mm_embeddings": ("shift_computed_tokens",),
    "vllm.v1.worker.gpu.model_states.mm_pruning:MultiModalPruner.recompute": ("mm_embeds",),
}
ROTARY_NAMES: Mapping[str, tuple[str, ...]] = {
    "vllm.model_executor.layers.rotary_embedding.mrope:MRotaryEmbedding._compute_inv_freq": ("base",),
}
_TOWER = ("x", "grid_thw")
_SIZE = ("image_width", "image_height", "image_processor", "mm_kwargs")
QWEN2_VL_NAMES: Mapping[str, tuple[str, ...]] = {
    f"{_MODELS}.qwen2_vl:Qwen2VLMultiModalProcessor": ("info", "dummy_inputs"),
    f"{_MODELS}.qwen2_vl:Qwen2VLProcessingInfo.get_num_image_tokens": ("image_processor", "mm_kwargs"),
    f"{_MODELS}.qwen2_vl:Qwen2VLProcessingInfo._get_vision_info": _SIZE,
    f"{_MODELS}.qwen2_vl:Qwen2VLForConditionalGeneration.get_mrope_input_positions": (
        "input_tokens",
        "mm_features",
    ),
    f"{_MODELS}.qwen2_vl:Qwen2VisionTransformer.forward": _TOWER,
    f"{_MODELS}.qwen2_vl:Qwen2VisionPatchMerger.forward": ("x",),
}
QWEN2_5_VL_NAMES: Mapping[str, tuple[str, ...]] = {
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLMultiModalProcessor": ("info", "dummy_inputs"),
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions": (
        "input_tokens",
        "mm_features",
    ),
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration.recompute_mrope_positions": (
        "input_ids",
        "multimodal_embeddings",
        "mrope_positions",
        "num_computed_tokens",
    ),
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VisionTransformer.forward": _TOWER,
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VisionTransformer.get_window_index_thw": ("grid_t", "grid_h", "grid_w"),
}
QWEN3_VL_NAMES: Mapping[str, tuple[str, ...]] = {
    f"{_MODELS}.qwen3_vl:Qwen3VLMultiModalProcessor": ("info", "dummy_inputs"),
    f"{_MODELS}.qwen3_vl:Qwen3VLProcessingInfo._get_vision_info": _SIZE,
    f"{_MODELS}.qwen3_vl:Qwen3VLForConditionalGeneration.get_mrope_input_positions": (
        "input_tokens",
        "mm_features",
    ),
    f"{_MODELS}.qwen3_vl:Qwen3VLForConditionalGeneration._compute_deepstack_embeds": ("multimodal_embeddings",),
    f"{_MODELS}.qwen3_vl:Qwen3_VisionTransformer.forward": _TOWER,
    f"{_MODELS}.qwen3_vl:Qwen3_VisionPatchMerger.forward": ("x",),
}
