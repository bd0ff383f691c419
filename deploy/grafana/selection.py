"""The dashboard *Selection*: how long choosing tokens takes, what images are like, what they keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from overview import in_range, per_second, quantile
from panels import BLUE, GREEN, ORANGE, PURPLE, RED, YELLOW, cells, lines, number

UID = "promprune-selection"
TITLE = "PromPrune: selection"
DESCRIPTION = "How long choosing visual tokens takes, what the images are like, and how many tokens they keep."
_METHOD = "$method"
_SECONDS, _KEPT = "promprune_selection_seconds", "promprune_image_kept_tokens"
_ENTROPY, _SALIENCY = "promprune_spectral_entropy", "promprune_saliency_share"
_BATCH = "promprune_encoder_batch_tokens"


def rows() -> Iterator[tuple[str, list[Any]]]:
    """Yield the rows, from the figures at the top to the encoder."""
    yield "In the time range on screen", _figures()
    yield "How long it takes", _time()
    yield "What the images are like", _content()
    yield "What they keep", _kept()
    yield "Vision encoder", _encoder()


def _mean(name: str, **labels: str) -> str:
    total, count = (in_range(f"{name}_{part}", **labels) for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


def _running_mean(name: str, by: str, **labels: str) -> str:
    total, count = (per_second(f"{name}_{part}", by, **labels) for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


def _buckets(name: str, **labels: str) -> str:
    return per_second(f"{name}_bucket", "le", **labels)


def _figures() -> list[Any]:
    slow = quantile(0.99, _SECONDS, method=_METHOD, stage="choose").replace("$interval", "$__range")
    return [
        number(
            "Images selected",
            "Images whose tokens were chosen. One that is still in the encoder cache is not selected again.",
            f"round({in_range(f'{_SECONDS}_count', method=_METHOD, stage='choose')})",
            "short",
            width=4,
        ),
        number(
            "Choosing, mean",
            "Time to choose the tokens of one image, on average.",
            _mean(_SECONDS, method=_METHOD, stage="choose"),
            "s",
            base=GREEN,
            steps=((0.1, YELLOW), (0.2, RED)),
            width=4,
        ),
        number(
            "Choosing, 99 % within",
            "99 of 100 images were done within this time. An alert is raised above 200 ms.",
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
            "Visual tokens one image keeps on average, of images this method pruned.",
            _mean(_KEPT, method=_METHOD),
            "tokens",
            decimals=0,
            width=4,
        ),
        number(
            "Spectral entropy, mean",
            "0: all tokens of an image are alike. 1: none are. PromPrune splits the budget by it.",
            _mean(_ENTROPY, method=_METHOD),
            "none",
            base=PURPLE,
            decimals=2,
            empty="not used by this method",
            width=4,
        ),
        number(
            "Saliency share, mean",
            "Part of the budget spent on tokens that the encoder attends to; the rest covers the other content.",
            _mean(_SALIENCY, method=_METHOD),
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
            "Choosing: quantiles",
            "Half, 95 % and 99 % of images had their tokens chosen within this time.",
            (quantile(0.5, _SECONDS, stage="choose", **of_method), "half within"),
            (quantile(0.95, _SECONDS, stage="choose", **of_method), "95 % within"),
            (quantile(0.99, _SECONDS, stage="choose", **of_method), "99 % within"),
            unit="s",
            colors={"half within": GREEN, "95 % within": YELLOW, "99 % within": RED},
        ),
        lines(
            "95 % within, by method and stage",
            "choose: decide which tokens stay. assemble: gather or merge their rows. Merging methods spend "
            "more on the second.",
            (quantile(0.95, _SECONDS, "method, stage", **of_method), "{{method}}, {{stage}}"),
            unit="s",
        ),
        lines(
            "Mean time of one image, by stage",
            "The two stages on top of each other: what an image costs altogether.",
            (_running_mean(_SECONDS, "stage", **of_method), "{{stage}}"),
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
            "Choosing: every image",
            "Each column is a moment, each cell a range of times: the brighter, the more images fell into "
            "it. A second bright band is a second kind of images, larger ones for example.",
            _buckets(_SECONDS, stage="choose", **of_method),
            unit="s",
        ),
        cells(
            "Assembling: every image",
            "The same for gathering or merging the rows of the tokens that stay.",
            _buckets(_SECONDS, stage="assemble", **of_method),
            unit="s",
        ),
    ]


def _content() -> list[Any]:
    return [
        cells(
            "Spectral entropy",
            "How varied the tokens of images are: low for plain images, high for busy ones. If nearly all "
            "lie at one end, `promprune calibrate` finds a better mu for this model.",
            _buckets(_ENTROPY, method=_METHOD),
            unit="none",
            scheme="Purples",
            width=8,
        ),
        cells(
            "Saliency share",
            "Part of each budget spent on salient tokens. All at 0 % or all at 100 % means that mu or tau "
            "does not suit this model.",
            _buckets(_SALIENCY, method=_METHOD),
            unit="percentunit",
            scheme="Oranges",
            width=8,
        ),
        lines(
            "Means, by method",
            "The two averages side by side: as images get more varied, less of the budget goes to salient tokens.",
            (_running_mean(_ENTROPY, "method", method=_METHOD), "entropy, {{method}}"),
            (_running_mean(_SALIENCY, "method", method=_METHOD), "saliency share, {{method}}"),
            unit="none",
            share=True,
            empty="not used by this method",
        ),
    ]


def _kept() -> list[Any]:
    every = f"{_METHOD}|none"
    return [
        cells(
            "Tokens kept by an image",
            "How many tokens images kept, those that kept everything included. Bands are budgets.",
            _buckets(_KEPT, method=every),
            unit="tokens",
            scheme="Greens",
            width=8,
        ),
        lines(
            "Tokens kept: quantiles",
            "Half and 95 % of images kept at most so many tokens.",
            (quantile(0.5, _KEPT, method=every), "half within"),
            (quantile(0.95, _KEPT, method=every), "95 % within"),
            unit="tokens",
            colors={"half within": GREEN, "95 % within": YELLOW},
        ),
        lines(
            "Images, by method",
            "Images each second by the method that prunes them; `none` are images that keep every token.",
            (per_second("promprune_images_total", "method", method=every), "{{method}}"),
            unit="images/s",
            stacked=True,
        ),
    ]


def _encoder() -> list[Any]:
    return [
        cells(
            "Tokens in one call of the encoder",
            "Unpruned tokens the vision encoder got at once. Pruning comes after it, so these do not shrink.",
            _buckets(_BATCH),
            unit="tokens",
            scheme="Blues",
            width=8,
        ),
        lines(
            "Calls of the encoder",
            "Calls (micro-batches) each second, and images selected each second: with several images in a "
            "call, the second line is the higher one.",
            (per_second(f"{_BATCH}_count"), "calls"),
            (per_second(f"{_SECONDS}_count", stage="choose"), "images selected"),
            unit="ops",
            colors={"calls": BLUE, "images selected": GREEN},
        ),
        lines(
            "Tokens of a call, mean",
            "Near one image's tokens: images come one by one. Higher: they are encoded together.",
            (f"{per_second(f'{_BATCH}_sum')} / ({per_second(f'{_BATCH}_count')} > 0)", "tokens of a call"),
            unit="tokens",
            colors={"tokens of a call": BLUE},
        ),
    ]
