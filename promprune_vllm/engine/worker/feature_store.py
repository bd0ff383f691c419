"""Keeps encoded images in host memory, so that none is encoded twice because a budget or a question changed."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import torch

from promprune_vllm.core.features import Need
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.packed_image import PackedImage, Packing

logger = logging.getLogger("vllm.promprune")
Key = tuple[bytes, int]
"""An image's identity, see ``keys.IDENTITY``, and its number of tokens before pruning."""


class FeatureStore:
    """The most recently used images, as many as fit.

    Args:
        capacity_bytes: Host memory for their pages.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.bytes = 0
        self._images: OrderedDict[Key, PackedImage] = OrderedDict()

    def __len__(self) -> int:
        return len(self._images)

    def get(self, key: Key, needs: Need) -> EncodedImage | None:
        """Return a copy of an image on its device; ``None`` if it is not here, or lacks one of the features."""
        packed = self._images.get(key)
        if packed is None or needs & ~packed.needs:
            return None
        self._images.move_to_end(key)
        try:
            return packed.unpack()
        except torch.OutOfMemoryError as error:  # then the image is encoded, on every rank
            logger.warning("No memory to unpack an encoded image (%s): it is encoded again.", error)
            return None

    def put(self, key: Key, image: EncodedImage) -> None:
        """Store a copy of an image without its request's text, in the place of those unused for longest.

        An image that is here with the same features stays; one larger than the capacity is not stored.
        """
        packing = Packing(image)
        held = self._images.get(key)
        if held is not None and not packing.needs & ~held.needs:
            self._images.move_to_end(key)
            return
        self.remove(key)
        if packing.bytes > self.capacity_bytes:
            return
        while self.bytes + packing.bytes > self.capacity_bytes:
            self.remove(next(iter(self._images)))
        try:
            packed = packing.copy()
        except RuntimeError as error:  # of torch, for memory: the image has been served, and will be encoded again
            logger.warning("No host memory to keep an encoded image (%s): lower the feature cache's size.", error)
            return
        self._images[key] = packed
        self.bytes += packed.bytes

    def remove(self, key: Key) -> None:
        """Remove an image, if it is here."""
        packed = self._images.pop(key, None)
        self.bytes -= 0 if packed is None else packed.bytes

    def clear(self) -> None:
        """Remove every image."""
        self._images.clear()
        self.bytes = 0


def clear_with_encoder_cache(original: Any) -> Any:
    """Wrap the reset of a runner's encoder cache: the model forgets its encoded images too."""

    def reset_encoder_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # A process may also run another engine, whose model is vLLM's own.
        forget = getattr(self.get_model(), "forget_images", None)
        if forget is not None:
            forget()
        return result

    return reset_encoder_cache
