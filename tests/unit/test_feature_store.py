"""The feature store: what it keeps and drops, what it counts, and that copies share no memory with an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promprune_vllm import Need, VisionFeatures
from promprune_vllm.engine.worker import packed_image
from promprune_vllm.engine.worker.encoded_image import EncodedImage, Group
from promprune_vllm.engine.worker.feature_store import FeatureStore, Key
from promprune_vllm.engine.worker.packed_image import PAGE_BYTES, Packing, _with_tensors

WIDE = 64
OF_A_PAGE = PAGE_BYTES // (WIDE * 4 + 4 + 8)  # tokens of an image that fills one: rows, saliency, positions


def key(number: int) -> Key:
    return bytes([number]) * 16, number


def image(tokens: int = OF_A_PAGE, *, seed: int = 0, saliency: bool = True) -> EncodedImage:
    """One of three images of a batch, whose tensors are views of the batch's; rows have a column more."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(3, tokens, WIDE, generator=generator)
    rows = batch[1]
    features = VisionFeatures(
        projected=rows[:, : WIDE - 1],
        grid=(1, 1, tokens),
        saliency=torch.rand(3, tokens, generator=generator)[1] if saliency else None,
    )
    return EncodedImage.whole(rows, features)


def tiles(dtype: torch.dtype = torch.bfloat16) -> EncodedImage:
    """An image of two groups with everything a family may give them, and a row of neither."""
    rows = torch.arange(7 * 6).reshape(7, 6).to(dtype)
    entropy = torch.tensor(0.25, dtype=torch.float64)
    groups = []
    for places in (torch.tensor([0, 1, 2]), torch.tensor([4, 5, 6])):
        features = VisionFeatures(
            projected=rows[places],
            grid=(1, 1, 3),
            saliency=torch.rand(3),
            encoder=torch.randn(3, 10).to(dtype),
            keys=torch.randn(5, 3).t()[:, :4],
            entropy=entropy,
        )
        groups.append(Group(features, places))
    return EncodedImage(rows, groups, torch.tensor([3]))


def tensors(image: EncodedImage) -> list[Tensor]:
    noted: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        noted.append(tensor)
        return tensor

    _with_tensors(image, note)
    return noted


def memories(images: Sequence[EncodedImage]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for each in images for tensor in tensors(each)}


def assert_same(one: EncodedImage, other: EncodedImage) -> None:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    grids = [[group.features.grid for group in each.groups] for each in (one, other)]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("made", [image(5), image(5, saliency=False), tiles(), tiles(torch.float32)])
def test_a_copy_is_the_image_bit_for_bit_and_shares_no_memory(made: EncodedImage) -> None:
    store = FeatureStore(PAGE_BYTES)
    store.put(key(1), made)
    expected = _with_tensors(made, Tensor.clone)
    first, second = (store.get(key(1), Need.PROJECTED) for _ in range(2))
    assert first is not None
    assert second is not None
    groups = [memories([each]) for each in (made, first, second)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    for tensor in (*tensors(made), *tensors(first)):  # what others do to theirs
        tensor.zero_()
    assert_same(second, expected)
    again = store.get(key(1), Need.PROJECTED)
    assert again is not None
    assert_same(again, expected)


def test_views_are_packed_once_and_alone() -> None:
    """Neither the batch that an image is a view of, nor its features beside its rows."""
    made = image(1000)
    packing = Packing(made)
    own = 1000 * WIDE * 4 + 1000 * 4 + 1000 * 8  # rows, saliency and positions
    assert packing._used_bytes == -(-own // 16) * 16
    copy = packing.copy().unpack()
    (group,) = copy.groups
    assert group.features.projected.data_ptr() == copy.rows.data_ptr()
    assert copy.rows.untyped_storage().nbytes() == 1000 * WIDE * 4
    assert group.features.saliency is not None
    assert group.features.saliency.untyped_storage().nbytes() == 1000 * 4


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=8))
def test_any_views_of_a_tensor_come_back(ranges: list[tuple[int, int]]) -> None:
    memory = torch.arange(60.0)
    views = [memory[start : start + count] for start, count in ranges]
    groups = [Group(VisionFeatures(view[:, None], (1, 1, len(view))), torch.arange(len(view))) for view in views]
    made = EncodedImage(memory[:1, None], groups, torch.empty(0, dtype=torch.int64))
    packing = Packing(made)
    assert_same(packing.copy().unpack(), made)
    elements = {0}.union(*(range(start, start + count) for start, count in ranges))
    floats = [span for span in packing._spans if span.flat.dtype is torch.float32]
    assert sum(len(span.flat) for span in floats) == len(elements)


def test_the_text_of_a_request_is_not_kept() -> None:
    store, made = FeatureStore(PAGE_BYTES), image(5)
    store.put(key(1), made.with_text(torch.ones(3, WIDE - 1)))
    found = store.get(key(1), Need.SALIENCY)
    assert found is not None
    assert found.groups[0].features.text is None
    assert_same(found, made)


def test_the_oldest_make_room_and_bytes_are_what_is_held() -> None:
    store = FeatureStore(3 * PAGE_BYTES)
    for number in (1, 2, 3):
        store.put(key(number), image(seed=number))
        assert store.bytes == number * PAGE_BYTES
    assert store.get(key(1), Need.SALIENCY) is not None
    store.put(key(2), image(seed=2))  # used as well, and not copied again
    store.put(key(4), image(seed=4))
    assert [number for _, number in store._images] == [1, 2, 4]
    store.put(key(5), image(2 * OF_A_PAGE, seed=5))  # of two pages
    assert [number for _, number in store._images] == [4, 5]
    pages = [page for packed in store._images.values() for page in packed.pages]
    assert store.bytes == sum(page.untyped_storage().nbytes() for page in pages) == 3 * PAGE_BYTES
    store.remove(key(5))
    store.remove(key(9))
    assert (len(store), store.bytes) == (1, PAGE_BYTES)
    store.clear()
    assert (len(store), store.bytes) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), max_size=30))
def test_it_never_holds_more_than_its_capacity(puts: list[tuple[int, int]]) -> None:
    store = FeatureStore(4 * PAGE_BYTES + 1)
    one_page = image()
    for number, _ in puts:
        store.put(key(number), one_page)
        assert store.bytes == len(store) * PAGE_BYTES <= store.capacity_bytes
        assert next(reversed(store._images)) == key(number)


def test_an_image_larger_than_the_capacity_leaves_the_others() -> None:
    store = FeatureStore(PAGE_BYTES)
    store.put(key(1), image())
    store.put(key(2), image(2 * OF_A_PAGE))
    assert [*store._images] == [key(1)]


def test_what_lacks_a_feature_is_not_found_and_is_replaced() -> None:
    store = FeatureStore(2 * PAGE_BYTES)
    store.put(key(1), image(saliency=False))
    assert store.get(key(1), Need.SALIENCY) is None
    assert store.get(key(1), Need.PROJECTED) is not None
    assert store.get((key(1)[0], 2), Need.PROJECTED) is None  # with another number of tokens
    store.put(key(1), image())
    assert store.get(key(1), Need.SALIENCY) is not None
    store.put(key(1), image(saliency=False))  # has less: what is there stays
    assert store.get(key(1), Need.SALIENCY) is not None
    assert store.bytes == PAGE_BYTES


def test_a_feature_of_one_group_alone_is_no_feature_of_the_image() -> None:
    made = tiles()
    first, second = made.groups
    poorer = replace(made, groups=[first, Group(replace(second.features, keys=None), second.positions)])
    assert Packing(made).needs == Need.PROJECTED | Need.SALIENCY | Need.ENCODER | Need.KEYS
    assert Packing(poorer).needs == Need.PROJECTED | Need.SALIENCY | Need.ENCODER


def test_without_memory_an_image_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def copy(_: Packing) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    store = FeatureStore(PAGE_BYTES)
    store.put(key(1), image(saliency=False))
    monkeypatch.setattr(packed_image.Packing, "copy", copy)
    store.put(key(1), image())
    assert (len(store), store.bytes) == (0, 0)
    assert "not enough memory" in caplog.text
