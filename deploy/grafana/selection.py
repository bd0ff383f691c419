"""The *Selection* dashboard: how long token selection takes, what images are like, how many tokens they keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from panels import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, YELLOW, cells, lines, number
from promql import buckets, in_range, mean, per_second, quantile, running_mean

UID = "promprune-selection"
TITLE = "PromPrune: selection"
DESCRIPTION = "How long token selection takes, what images and videos are like, and how many tokens they keep."
_METHOD = "$method"
_OF_IMAGES = {"modality": "image"}
_SECONDS, _KEPT = "promprune_selection_seconds", "promprune_image_kept_tokens"
_ENTROPY, _SALIENCY = "promprune_spectral_entropy", "promprune_saliency_share"
_BATCH = "promprune_encoder_batch_tokens"
_STORE = "promprune_feature_store"


def rows() -> Iterator[tuple[str, list[Any]]]:
    """Yield the rows, from the key figures at the top to the encoder."""
    yield "Over the selected time range", _figures()
    yield "How long selection takes", _time()
    yield "What the images and videos are like", _content()
    yield "How many tokens images keep (videos: see the overview)", _kept()
    yield "Vision encoder", _encoder()
    yield "Feature cache (--visual-token-feature-cache-gb)", _feature_cache()


def _figures() -> list[Any]:
    slow = quantile(0.99, _SECONDS, method=_METHOD, stage="choose").replace("$interval", "$__range")
    return [
        number(
            "Images and videos pruned",
            "Images and videos whose tokens were selected. Those in the encoder cache are not selected again.",
            f"round({in_range(f'{_SECONDS}_count', method=_METHOD, stage='choose')})",
            "short",
            width=4,
        ),
        number(
            "Selection time, mean",
            "Average time to select the tokens of one image or video.",
            mean(_SECONDS, method=_METHOD, stage="choose"),
            "s",
            base=GREEN,
            steps=((0.1, YELLOW), (0.2, RED)),
            width=4,
        ),
        number(
            "Selection time, p99",
            "99% of images and videos took less than this time to select. There is an alert above 200 ms.",
            f"{slow} >= 0",
            "s",
            base=GREEN,
            steps=((0.1, YELLOW), (0.2, RED)),
            width=4,
        ),
        *_averages(),
    ]


def _averages() -> list[Any]:
    return [
        number(
            "Tokens kept, mean",
            "Average number of visual tokens kept per image, over images that this method pruned.",
            mean(_KEPT, method=_METHOD, **_OF_IMAGES),
            "tokens",
            decimals=0,
            width=4,
        ),
        number(
            "Spectral entropy, mean",
            "0: all tokens of an image are alike. 1: all are different. PromPrune splits the budget by it. Of a "
            "video, each frame counts.",
            mean(_ENTROPY, method=_METHOD),
            "none",
            base=PURPLE,
            decimals=2,
            empty="not used by this method",
            width=4,
        ),
        number(
            "Saliency share, mean",
            "Share of the budget spent on tokens that the encoder attends to; the rest covers the other content.",
            mean(_SALIENCY, method=_METHOD),
            "percentunit",
            base=ORANGE,
            decimals=0,
            empty="not used by this method",
            width=4,
        ),
    ]


def _time() -> list[Any]:
    of_method = {"method": _METHOD}
    return [
        lines(
            "Selection time: quantiles",
            "50%, 95% and 99% of images and videos had their tokens selected within this time.",
            (quantile(0.5, _SECONDS, stage="choose", **of_method), "p50"),
            (quantile(0.95, _SECONDS, stage="choose", **of_method), "p95"),
            (quantile(0.99, _SECONDS, stage="choose", **of_method), "p99"),
            unit="s",
            colors={"p50": GREEN, "p95": YELLOW, "p99": RED},
        ),
        lines(
            "p95 by method and stage",
            "choose: decide which tokens to keep. assemble: gather or merge their rows, which takes longer for "
            "merging methods.",
            (quantile(0.95, _SECONDS, "method, stage", **of_method), "{{method}}, {{stage}}"),
            unit="s",
        ),
        lines(
            "Mean time, by stage",
            "Both stages, stacked: the total cost of pruning an image or a video.",
            (running_mean(_SECONDS, "stage", **of_method), "{{stage}}"),
            unit="s",
            colors={"choose": BLUE, "assemble": PURPLE},
            stacked=True,
        ),
        *_time_of_every_image(),
    ]


def _time_of_every_image() -> list[Any]:
    of_method = {"method": _METHOD}
    return [
        cells(
            "Selection time: distribution",
            "Each column is a point in time, each cell a range of durations; brighter means more images and "
            "videos. A second bright band is a second kind, for example larger images, or videos.",
            buckets(_SECONDS, stage="choose", **of_method),
            unit="s",
        ),
        cells(
            "Assembly time: distribution",
            "The same for gathering or merging the rows of the kept tokens.",
            buckets(_SECONDS, stage="assemble", **of_method),
            unit="s",
        ),
    ]


def _content() -> list[Any]:
    return [
        cells(
            "Spectral entropy",
            "How varied the tokens of images and of frames of videos are: low for plain ones, high for busy ones. "
            "If nearly all are at one end, `promprune calibrate` finds a better mu for this model.",
            buckets(_ENTROPY, method=_METHOD),
            unit="none",
            scheme="Purples",
            width=8,
        ),
        cells(
            "Saliency share",
            "Share of each budget spent on salient tokens. All at 0% or all at 100% means that mu or tau does "
            "not fit this model.",
            buckets(_SALIENCY, method=_METHOD),
            unit="percentunit",
            scheme="Oranges",
            width=8,
        ),
        lines(
            "Means, by method",
            "Both averages: the more varied the images, the less of the budget goes to salient tokens.",
            (running_mean(_ENTROPY, "method", method=_METHOD), "entropy, {{method}}"),
            (running_mean(_SALIENCY, "method", method=_METHOD), "saliency share, {{method}}"),
            unit="none",
            share=True,
            empty="not used by this method",
        ),
    ]


def _kept() -> list[Any]:
    every = f"{_METHOD}|none"
    return [
        cells(
            "Tokens kept per image",
            "Number of tokens kept per image, including images that kept every token. Bands are budgets.",
            buckets(_KEPT, method=every, **_OF_IMAGES),
            unit="tokens",
            scheme="Greens",
            width=8,
        ),
        lines(
            "Tokens kept: quantiles",
            "50% and 95% of images kept at most this many tokens.",
            (quantile(0.5, _KEPT, method=every, **_OF_IMAGES), "p50"),
            (quantile(0.95, _KEPT, method=every, **_OF_IMAGES), "p95"),
            unit="tokens",
            colors={"p50": GREEN, "p95": YELLOW},
        ),
        lines(
            "Images, by method",
            "Images per second, by the method that prunes them; `none` means images that keep every token.",
            (per_second("promprune_images_total", "method", method=every, **_OF_IMAGES), "{{method}}"),
            unit="images/s",
            colors={"none": GRAY},
            stacked=True,
        ),
    ]


def _encoder() -> list[Any]:
    return [
        cells(
            "Tokens per encoder call",
            "Unpruned tokens in one call of the vision encoder. Pruning happens after it, so they do not shrink.",
            buckets(_BATCH),
            unit="tokens",
            scheme="Blues",
            width=8,
        ),
        lines(
            "Encoder calls",
            "Calls (micro-batches) per second, and images and videos pruned per second: with several per call, "
            "the second line is higher.",
            (per_second(f"{_BATCH}_count"), "calls"),
            (per_second(f"{_SECONDS}_count", stage="choose"), "pruned"),
            unit="ops",
            colors={"calls": BLUE, "pruned": GREEN},
        ),
        lines(
            "Tokens per encoder call, mean",
            "Close to one image's tokens: images are encoded one by one. Higher: they are encoded together.",
            (f"{per_second(f'{_BATCH}_sum')} / ({per_second(f'{_BATCH}_count')} > 0)", "tokens per call"),
            unit="tokens",
            colors={"tokens per call": BLUE},
        ),
    ]


def _feature_cache() -> list[Any]:
    found = per_second(f"{_STORE}_images_total", result="hit")
    return [
        lines(
            "Found in the feature cache",
            "Images and videos per second that the worker had encoded before (hit), and had to encode (miss).",
            (per_second(f"{_STORE}_images_total", "result"), "{{result}}"),
            unit="items/s",
            colors={"hit": GREEN, "miss": ORANGE},
            stacked=True,
            empty="off",
        ),
        lines(
            "Share found",
            "What was not encoded again, of the images and videos needed. Low with a full cache: more memory "
            "would help. Low with an empty one: clients send each image once, and the cache only costs.",
            (f"{found} / ({per_second(f'{_STORE}_images_total')} > 0)", "found"),
            unit="percentunit",
            colors={"found": GREEN},
            share=True,
            empty="off",
        ),
        lines(
            "Memory of the feature cache",
            "Host memory of what is stored, on the first rank of every engine. It grows to the option's value.",
            (f'sum({_STORE}_bytes{{model_name=~"$model"}})', "stored"),
            unit="bytes",
            colors={"stored": BLUE},
            empty="off",
        ),
    ]
