"""Configuration of an InternVLChat checkpoint. A copy lies in each: transformers has no such class.

Loading it needs ``trust_remote_code``, as with the published checkpoints.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    """Sizes of the vision tower."""

    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    """A vision tower, a language model, and how images are cut into tiles."""

    model_type = "internvl_chat"
    _auto_class = "AutoConfig"  # save_pretrained copies this file and names it in config.json

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Args:
        vision_config: Fields of an ``InternVisionConfig``.
        llm_config: Fields of the language model's configuration, with its ``model_type``.
        options: Other fields of config.json.
        """
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        language = dict(llm_config or {"model_type": "qwen2"})
        self.llm_config = AutoConfig.for_model(**language)
        super().__init__(**options)
