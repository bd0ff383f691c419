"""What every method owes its host. The registry says which methods there are."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import promprune_vllm
from promprune_vllm import Need, Selection, VisionFeatures, get_method, methods, select_many
from promprune_vllm.commands.methods import describe
from promprune_vllm.core.registry import option_names
from promprune_vllm.errors import SettingsError
from tests.waits import EIGENVALUES, NoWaits, to_gpu

METHODS = list(methods())
KINDS = ["random", "constant", "duplicate", "rank1", "huge", "zero rows", "all zero", "tied saliency"]
WIDTHS = {"projected": 10, "encoder": 7, "keys": 5}

_AS_VLLM = "it computes in the type of the features as vLLM does, and sums depend on the order of columns"
EXEMPT_FROM_COLUMN_ORDER = {
    **dict.fromkeys(("evs", "vidcom2"), _AS_VLLM),
    "random": "its keys are seeded by the bits of the image, column by column",
}
EXEMPT_FROM_SCALE = {
    "random": "its keys are seeded by the bits of the image",
    "prunesid": "its components are those of sigmoid(X), which a scale bends",
}


def variants() -> Iterator[Any]:
    """Every combination of a method's switches and named choices that it accepts, but the default."""
    for name, cls in methods().items():
        hints = get_type_hints(cls)
        choices = {o: (False, True) if hints[o] is bool else get_args(hints[o]) for o in option_names(cls)}
        choices = {option: values for option, values in choices.items() if values}
        for values in itertools.product(*choices.values()):
            options = dict(zip(choices, values, strict=True))
            with contextlib.suppress(SettingsError):
                if get_method(name, **options) != get_method(name):
                    yield pytest.param(name, options, id="-".join([name, *map(str, values)]))


every_method = pytest.mark.parametrize("method", METHODS)
both_paths = pytest.mark.usefixtures("kernels")
few = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],  # kernels: one per test
)


def draw(
    grid: tuple[int, int, int], *, kind: str = "random", seed: int = 0, dtype: torch.dtype = torch.float32
) -> VisionFeatures:
    """A group that carries everything a method can need."""
    n = grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(seed)

    def gauss(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def tokens(width: int) -> Tensor:
        x = {"constant": lambda: gauss(1, width).expand(n, width), "rank1": lambda: gauss(n, 1) * gauss(1, width)}
        values = x.get(kind, lambda: gauss(n, width))().clone()
        if kind == "duplicate":
            values = values[torch.arange(n) % 3 % n]
        if kind == "huge":
            values *= 1e30
        if kind == "zero rows":
            values[::2] = 0
        return values.to(dtype) * (kind != "all zero")

    saliency = torch.rand(n, generator=generator) / n
    return VisionFeatures(
        **{name: tokens(width) for name, width in WIDTHS.items()},
        grid=grid,
        saliency=saliency.round(decimals=2) if kind == "tied saliency" else saliency,
        text=gauss(3, WIDTHS["projected"]).to(dtype),
    )


def select(features: VisionFeatures, keep: int, method: str, **options: Any) -> Selection:
    """As ``promprune_vllm.select``. For a method that compares frames, each row of the image is a frame."""
    if methods()[method].over_frames:
        t, h, w = features.grid
        features = changed(features, grid=(t * h, 1, w) if t * h > 1 else (w, 1, 1))
    return promprune_vllm.select(features, keep, method, **options)


def tensors(features: VisionFeatures) -> dict[str, Tensor]:
    present = {field.name: getattr(features, field.name) for field in dataclasses.fields(features)}
    return {name: value for name, value in present.items() if isinstance(value, Tensor)}


def changed(features: VisionFeatures, **values: Any) -> VisionFeatures:
    return dataclasses.replace(features, **values)


def check(selection: Selection, features: VisionFeatures, keep: int, method: str | None = None) -> None:
    indices, rows = selection.indices, selection.rows
    assert indices.dtype == torch.int64
    assert indices.shape == (keep,)
    assert indices[0] >= 0
    assert indices[-1] < features.tokens
    assert (indices.diff() > 0).all()
    assert method is None or (rows is not None) == methods()[method].merges
    if rows is not None:
        made_of = {Need.PROJECTED: features.projected, Need.ENCODER: features.encoder}[selection.space]
        assert made_of is not None
        assert rows.shape == (keep, made_of.shape[1])
        assert rows.dtype == made_of.dtype
        assert rows.isfinite().all()
    assert all(value.ndim == 0 for value in selection.report.values())


def same(a: Selection, b: Selection) -> bool:
    rows_match = a.rows is b.rows is None or (
        a.rows is not None and b.rows is not None and torch.equal(a.rows, b.rows)
    )
    return torch.equal(a.indices, b.indices) and rows_match


@st.composite
def groups(draw_: st.DrawFn, kinds: list[str] = KINDS) -> tuple[VisionFeatures, int]:
    grid = draw_(st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(2, 7)))
    features = draw(grid, kind=draw_(st.sampled_from(kinds)), seed=draw_(st.integers(0, 99)))
    return features, draw_(st.integers(1, features.tokens - 1))


@both_paths
@every_method
@few
@given(group=groups())
def test_keeps_exactly_k_in_raster_order(method: str, group: tuple[VisionFeatures, int]) -> None:
    features, keep = group
    check(select(features, keep, method), features, keep, method)


@both_paths
@every_method
def test_takes_every_budget(method: str) -> None:
    features = draw((1, 3, 5))
    for keep in range(1, 15):
        check(select(features, keep, method), features, keep, method)


@both_paths
@pytest.mark.parametrize(("method", "options"), list(variants()))
def test_options_change_nothing_of_this(method: str, options: dict[str, Any]) -> None:
    for kind in KINDS:
        features = draw((1, 3, 5), kind=kind)
        for keep in (1, 7, 14):
            selection = select(features, keep, method, **options)
            check(selection, features, keep)
            assert same(selection, select(features, keep, method, **options))


@both_paths
@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_survives_degenerate_features(method: str, kind: str) -> None:
    features = draw((1, 3, 5), kind=kind)
    for keep in (1, 7, 14):
        check(select(features, keep, method), features, keep, method)


@both_paths
@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_takes_every_floating_type(method: str, dtype: torch.dtype) -> None:
    features = draw((1, 4, 6), dtype=dtype)
    check(select(features, 9, method), features, 9, method)
    narrow = changed(features, saliency=features.saliency.to(dtype))  # type: ignore[union-attr]
    check(select(narrow, 9, method), narrow, 9, method)


@every_method
@pytest.mark.parametrize(("grid", "keep"), [((1, 1, 2), 1), ((1, 30, 50), 40), ((2, 13, 31), 700)], ids=str)
def test_takes_the_smallest_and_large_images(method: str, grid: tuple[int, int, int], keep: int) -> None:
    features = draw(grid)
    check(select(features, keep, method), features, keep, method)


@both_paths
@every_method
@few
@given(group=groups())
def test_leaves_its_inputs_alone_and_repeats_itself(method: str, group: tuple[VisionFeatures, int]) -> None:
    features, keep = group
    before = {name: value.clone() for name, value in tensors(features).items()}
    first = select(features, keep, method)
    assert all(torch.equal(value, before[name]) for name, value in tensors(features).items())
    assert same(first, select(features, keep, method))
    assert same(first, select(changed(features, **before), keep, method))


@both_paths
@every_method
def test_an_image_keeps_the_same_tokens_in_every_batch(method: str) -> None:
    images = [draw((1, 5, 8), kind=kind, seed=seed) for seed, kind in enumerate(KINDS)]
    assert len(images) == 8
    alone = [select(image, 11, method) for image in reversed(images)][::-1]
    stacked = {name: torch.stack([tensors(image)[name] for image in images]) for name in tensors(images[0])}
    for i, expected in enumerate(alone):
        in_batch = changed(images[i], **{name: value[i] for name, value in stacked.items()})
        assert same(select(in_batch, 11, method), expected)


@both_paths
@pytest.mark.parametrize(("method", "options"), list(variants()))
def test_crops_chosen_together_keep_what_each_keeps_alone(method: str, options: dict[str, Any]) -> None:
    crops = [draw(grid, seed=seed) for seed, grid in enumerate([(1, 4, 5), (1, 3, 5), (1, 4, 5), (1, 1, 2)])]
    keeps = (9, 4, 8, 2)  # the last keeps all
    chosen = select_many(crops, keeps, method, **options)
    alone = [select(crop, keep, method, **options) for crop, keep in zip(crops, keeps, strict=True)]
    assert all(map(same, chosen, alone))


@both_paths
@every_method
@few
@given(group=groups(), seed=st.integers(0, 99))
def test_the_order_of_columns_does_not_matter(method: str, group: tuple[VisionFeatures, int], seed: int) -> None:
    if method in EXEMPT_FROM_COLUMN_ORDER:
        pytest.skip(EXEMPT_FROM_COLUMN_ORDER[method])
    features, keep = group
    generator = torch.Generator().manual_seed(seed)
    order = {name: torch.randperm(width, generator=generator) for name, width in WIDTHS.items()}
    order["text"] = order["projected"]
    permuted = changed(features, **{name: tensors(features)[name][:, columns] for name, columns in order.items()})
    expected, got = select(features, keep, method), select(permuted, keep, method)
    assert torch.equal(got.indices, expected.indices)
    if expected.rows is not None:
        columns = order["encoder" if expected.space is Need.ENCODER else "projected"]
        assert got.rows is not None
        assert (got.rows - expected.rows[:, columns]).abs().max() <= 1e-5 * expected.rows.abs().max()


@both_paths
@every_method
@few
@given(group=groups(), exponent=st.integers(-6, 6))
def test_a_common_scale_does_not_matter(method: str, group: tuple[VisionFeatures, int], exponent: int) -> None:
    if method in EXEMPT_FROM_SCALE:
        pytest.skip(EXEMPT_FROM_SCALE[method])
    features, keep = group
    factor = 2.0**exponent
    scaled = {name: value * factor for name, value in tensors(features).items() if name != "saliency"}
    expected, got = select(features, keep, method), select(changed(features, **scaled), keep, method)
    assert torch.equal(got.indices, expected.indices)
    if expected.rows is not None:
        assert got.rows is not None
        assert torch.equal(got.rows, expected.rows * factor)


@every_method
@pytest.mark.parametrize("need", [Need.ENCODER, Need.KEYS, Need.SALIENCY, Need.TEXT], ids=str)
def test_names_what_it_misses(method: str, need: Need) -> None:
    assert need.name
    lacking = changed(draw((1, 4, 5)), **{need.name.lower(): None})
    if need in methods()[method].needs:
        with pytest.raises(ValueError, match=rf"'{method}' needs {need.name}, which"):
            select(lacking, 6, method)
    else:
        assert same(select(lacking, 6, method), select(draw((1, 4, 5)), 6, method))


@pytest.mark.parametrize(
    ("method", "options"), [*(pytest.param(name, {}, id=name) for name in METHODS), *variants()]
)
def test_never_waits_for_the_device(method: str, options: dict[str, Any]) -> None:
    """But for the reference's solver of eigenvalues, which the kernels for CUDA do without."""
    features = draw((1, 4, 5))
    nowhere = changed(features, **to_gpu(tensors(features)))
    with NoWaits([EIGENVALUES]):
        assert select(nowhere, 6, method, **options).indices.shape == (6,)


@every_method
def test_keeping_everything_is_not_pruning(method: str) -> None:
    features = draw((1, 4, 5))
    for keep in (20, 21):
        selection = select(features, keep, method)
        assert selection.indices.tolist() == list(range(20))
        assert selection.rows is None


@every_method
def test_is_a_frozen_dataclass_with_defaults_and_a_summary(method: str) -> None:
    selector = get_method(method)
    for option in option_names(selector):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(selector, option, None)
    row = next(row for row in describe() if row["name"] == method)
    assert row["summary"].endswith(".")
    assert row["paper"]
    assert row["needs"]


def test_exemptions_are_of_methods() -> None:
    assert {*EXEMPT_FROM_COLUMN_ORDER, *EXEMPT_FROM_SCALE} <= set(METHODS)
