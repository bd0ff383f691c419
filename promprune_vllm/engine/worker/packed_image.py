"""Copies an encoded image to pages of host memory, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from promprune_vllm.core.features import Need
from promprune_vllm.engine.worker.encoded_image import EncodedImage, Group

PAGE_BYTES = 1 << 20
"""All pages have one size, a power of two: torch rounds pinned memory up to one, and keeps what is freed.

So an image gets the very pages that others have left, and torch never holds more than was in use at one time.
"""
_ALIGNMENT = 16  # bytes; a multiple of the size of every type
_FEATURES = ("projected", "saliency", "encoder", "keys", "entropy")  # not the text, which belongs to a request


@dataclass(slots=True)
class _Span:
    """A run of elements in the memory of some tensors of an image, which are views of it.

    Args:
        flat: ``(n,)``, the elements.
        start: Index of the first one in that memory.
        offset: Where they begin in the packed image, in bytes.
    """

    flat: Tensor
    start: int
    offset: int = 0

    @property
    def end(self) -> int:
        """Index behind the last element."""
        return self.start + len(self.flat)

    @property
    def bytes(self) -> int:
        """Size of the elements."""
        return len(self.flat) * self.flat.element_size()


@dataclass(frozen=True, slots=True)
class PackedImage:
    """An encoded image in host memory.

    Args:
        pages: Its bytes, ``PAGE_BYTES`` in each page.
        template: The image, of tensors without values.
        spans: Offset in bytes, number of elements, and their type.
        views: Of each tensor: its span, and the index of its first element in it.
        device: Where the image was.
        needs: Features that all its groups have.
    """

    pages: Sequence[Tensor]
    template: EncodedImage
    spans: Sequence[tuple[int, int, torch.dtype]]
    views: Sequence[tuple[int, int]]
    device: torch.device
    needs: Need

    @property
    def bytes(self) -> int:
        """Size of the pages."""
        return len(self.pages) * PAGE_BYTES

    def unpack(self) -> EncodedImage:
        """Return a copy of the image on its device; see ``Packing.copy``."""
        packed = torch.empty(self.bytes, dtype=torch.uint8, device=self.device)
        for part, page in zip(torch.split(packed, PAGE_BYTES), self.pages, strict=True):
            part.copy_(page, non_blocking=True)
        # Each span has memory of its own: whoever keeps an image's rows must not keep all its features with them.
        flats = [
            packed[offset : offset + count * dtype.itemsize].view(dtype).clone()
            for offset, count, dtype in self.spans
        ]
        views = iter(self.views)

        def view(template: Tensor) -> Tensor:
            span, first = next(views)
            return flats[span].as_strided(template.shape, template.stride(), first)

        return _with_tensors(self.template, view)


class Packing:
    """An image that is about to be packed, without the text of its request.

    What tensors share is packed once: the features of an image are mostly views of its rows.

    Args:
        image: The image.
    """

    def __init__(self, image: EncodedImage) -> None:
        self._device = image.rows.device
        tensors: list[Tensor] = []
        self._template = _with_tensors(image, lambda tensor: _note(tensors, tensor))
        self._spans, self._views = _spans(tensors)
        self._used_bytes = 0
        for span in self._spans:
            span.offset = self._used_bytes
            self._used_bytes += -(-span.bytes // _ALIGNMENT) * _ALIGNMENT
        self.needs = Need(~Need.TEXT)
        for group in image.groups:
            self.needs &= group.features.has

    @property
    def bytes(self) -> int:
        """Size of the pages that the image takes."""
        return -(-self._used_bytes // PAGE_BYTES) * PAGE_BYTES

    def copy(self) -> PackedImage:
        """Copy the image to the host.

        On CUDA, this and ``unpack`` queue copies on the current stream, and the host does not wait. The stream
        runs them in order with the kernels that make the values and those that use them, and torch gives a freed
        page to nobody before the copies that were queued for it.
        """
        packed = torch.empty(self.bytes, dtype=torch.uint8, device=self._device)
        for span in self._spans:
            packed[span.offset : span.offset + span.bytes] = span.flat.view(torch.uint8)
        pages = [_empty_page(self._device) for _ in range(self.bytes // PAGE_BYTES)]
        for page, part in zip(pages, torch.split(packed, PAGE_BYTES), strict=True):
            page.copy_(part, non_blocking=True)
        spans = [(span.offset, len(span.flat), span.flat.dtype) for span in self._spans]
        return PackedImage(pages, self._template, spans, self._views, self._device, self.needs)


def _empty_page(device: torch.device) -> Tensor:
    """Return a page for values of a device."""
    if device.type != "cuda":
        return torch.empty(PAGE_BYTES, dtype=torch.uint8, device="cpu")
    from vllm.utils.platform_utils import is_pin_memory_available

    return torch.empty(PAGE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=is_pin_memory_available())


def _with_tensors(image: EncodedImage, change: Callable[[Tensor], Tensor]) -> EncodedImage:
    """Return an image with each of its tensors changed, always in the same order, and without text."""
    groups = []
    for group in image.groups:
        values = {name: getattr(group.features, name) for name in _FEATURES}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if value is not None}
        groups.append(Group(replace(group.features, text=None, **changed), change(group.positions)))
    # The text between frames belongs to a request, too.
    return replace(image, rows=change(image.rows), groups=groups, newlines=change(image.newlines), between=None)


def _note(tensors: list[Tensor], tensor: Tensor) -> Tensor:
    """Add a tensor to a list, and return one like it without values."""
    tensors.append(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _spans(tensors: Sequence[Tensor]) -> tuple[list[_Span], list[tuple[int, int]]]:
    """Return the runs of elements that tensors are views of, and each tensor's run and first element in it."""
    spans: list[_Span] = []
    span_of: dict[int, int] = {}
    before: tuple[int, str] | None = None
    for i in sorted(range(len(tensors)), key=lambda i: (*_memory(tensors[i]), tensors[i].storage_offset())):
        tensor = tensors[i]
        start = int(tensor.storage_offset())
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = start + last + 1 if tensor.numel() else start
        if before != _memory(tensor) or start >= spans[-1].end:
            spans.append(_Span(tensor.as_strided((end - start,), (1,), start), start))
        elif end > spans[-1].end:
            first = spans[-1].start
            spans[-1].flat = tensor.as_strided((end - first,), (1,), first)
        span_of[i], before = len(spans) - 1, _memory(tensor)
    views = [
        (span_of[i], int(tensor.storage_offset()) - spans[span_of[i]].start) for i, tensor in enumerate(tensors)
    ]
    return spans, views


def _memory(tensor: Tensor) -> tuple[int, str]:
    """Return what tells the memory of a tensor from others': its address, and how it is read."""
    return tensor.untyped_storage().data_ptr(), str(tensor.dtype)
