"""The contract of a model family: what it implements, and what it may use from vLLM.

A family has two classes, each with one of our mixins in front of a vLLM class:

- a processor: ``class PrunedX(PrunedProcessorMixin, upstream.XProcessor)`` implements ``ProcessorFamily``;
- a model: ``class PrunedX(PrunedModelMixin, upstream.X)`` implements ``ModelFamily``.

The mixins inherit from these classes for the type checker only. At run time, such a class between a mixin and
vLLM's class would override vLLM's methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from promprune_vllm.core.features import Need
    from promprune_vllm.core.geometry import Box
    from promprune_vllm.engine.api_server.all_media import Counted
    from promprune_vllm.engine.api_server.prompt_videos import VideoShape
    from promprune_vllm.engine.api_server.seen_frames import SeenFrames
    from promprune_vllm.engine.worker.encoded_image import EncodedImage


class ProcessorFamily(Protocol):
    """What a family's processor knows about its model, in the API server."""

    supplies: ClassVar[Need]
    """Features that the family's model can capture, all of them unless the family says otherwise; and the text."""

    kinds: ClassVar[Sequence[str]]
    """What is pruned, vLLM's modalities: images unless the family says otherwise, or images and videos."""

    def image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:
        """Return how many visual tokens an image has in vLLM.

        Args:
            images: Has ``get_image_size(index)``.
            index: Which image.
            kwargs: The request's processor options, without ours.
        """

    def video_shape(self, item: Any, total: int) -> VideoShape:
        """Return the shape of a video that the Hugging Face processor has processed.

        Args:
            item: What vLLM would send to the worker, by field.
            total: Visual tokens of the video.
        """

    def seen_frames(self, item: Any) -> SeenFrames:
        """Return the frames of a video as the model gets them.

        Args:
            item: What vLLM would send to the worker, by field.
        """

    def boxes(self, width: int, height: int) -> list[Box | None]:
        """Return the pixel box of each visual token of an image; ``None`` for tokens that show nothing of it."""

    def check_kept(self, media: Sequence[Counted], kwargs: Mapping[str, object]) -> None:
        """Raise ``BudgetError`` if the model cannot handle so few tokens of these images and videos.

        Args:
            media: Tokens of each before and after pruning, in order of appearance.
            kwargs: The request's processor options, without ours.
        """


class ModelFamily(Protocol):
    """What a family's model does, in the worker."""

    def capture(self, inputs: dict[str, Any], items: slice, needs: Need) -> list[EncodedImage]:
        """Encode some of the images and return them with the requested features.

        Args:
            inputs: vLLM's inputs of ``embed_multimodal`` for a batch of B images.
            items: Which of the B images.
            needs: Features to capture.
        """

    def project(self, rows: Tensor) -> Tensor:
        """Project ``(K, Dv)`` rows that a method merged before the projector, to ``(K, D)`` embeddings."""


class UpstreamProcessor:
    """The part of vLLM's ``BaseMultiModalProcessor`` that the mixin uses."""

    info: Any
    dummy_inputs: Any

    def __init__(self, info: Any, dummy_inputs: Any, **options: Any) -> None: ...

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one prompt."""

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inputs of the profiling run."""

    def _get_mm_hashes(self, inputs: Any) -> Any: ...

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Any: ...

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any: ...

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any: ...

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any: ...


class UpstreamModel:
    """The part of vLLM's model class that the mixins use."""

    config: Any
    visual: Any
    visual_dim: int
    vision_tower: Any
    multi_modal_projector: Any
    use_data_parallel: bool

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None: ...

    def embed_multimodal(self, **inputs: Any) -> Any:
        """Encode a batch of images."""

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Load the weights."""

    def get_language_model(self) -> Any:
        """Return the language model."""

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> Any:
        """Return the M-RoPE positions of a prompt."""

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Any, num_computed_tokens: int
    ) -> Any:
        """Correct M-RoPE positions from embeddings."""


if TYPE_CHECKING:

    class ProcessorBase(ProcessorFamily, UpstreamProcessor):
        """Base of ``PrunedProcessorMixin``."""

    class ModelBase(ModelFamily, UpstreamModel):
        """Base of ``PrunedModelMixin``."""

else:
    ProcessorBase = ModelBase = object
