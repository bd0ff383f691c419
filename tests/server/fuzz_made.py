"""Bodies drawn from the live document: each route's own fields, as its schema has them and as it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase, given
from schemathesis import Case, GenerationMode

from promprune_vllm.server.near_misses import FIELDS
from tests.server.fuzz_fields import add_apt, ask_for_pruning, tame
from tests.server.fuzz_parts import BASES, Body, base

# Routes whose bodies are those of another one, though their document does not say so.
_SAME = {"/invocations": "/v1/chat/completions"}
_NEEDED = {
    "model",
    "messages",
    "prompt",
    "input",
    "token_ids",
    "content_parts",
    "sampling_params",
    "images",
    "image",
}
_NEEDED |= {"state", "questions", "query", "items", "label_token_ids", "tokens", *FIELDS}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A fuzzed request.

    Args:
        path: Its route.
        plain: Without our fields.
        ours: With them.
        right: Whether what our fields say is right, whatever the images are.
    """

    path: str
    plain: Any
    ours: Any
    right: bool


def made(
    document: dict[str, Any], path: str, mode: GenerationMode, number: int, *, seed: int, method: str = "POST"
) -> list[Case]:
    """Return requests of a route that follow its document, or break it."""
    strategy = schemathesis.openapi.from_dict(document)[path][method].as_strategy(generation_mode=mode)
    cases: list[Case] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # sent later and in parallel, so there is nothing to shrink
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        cases.append(case)

    collect()
    return cases


def posts(document: Mapping[str, Any]) -> set[str]:
    """Return the routes that take a body or might."""
    return {path for path, verbs in document["paths"].items() if verbs.keys() & {"post", "put", "patch", "delete"}}


def fields(document: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the schemas of a route's own fields, but for those that `BASES` makes."""
    operation = document["paths"][_SAME.get(path, path)]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    found: dict[str, Any] = {}
    for each in schema.get("anyOf", schema.get("oneOf", [schema])):
        name = each.get("$ref", "").rpartition("/")[2]
        found |= document["components"]["schemas"][name].get("properties", {}) if name else {}
    return {name: value for name, value in found.items() if name not in _NEEDED}


class Made:
    """What schemathesis makes of the fields of each route, a part of which goes into each body."""

    def __init__(self, document: dict[str, Any], number: int, seed: int) -> None:
        document = deepcopy(document)
        paths = sorted(path for path in posts(document) if path in BASES)
        self.fields = {path: fields(document, path) for path in paths}
        self._pools: dict[str, tuple[list[Any], list[Any]]] = {}
        for path in paths:
            if not self.fields[path] or path in _SAME:
                continue
            content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            content["schema"] = {"type": "object", "properties": self.fields[path], "additionalProperties": False}
        for path in paths:
            if self.fields[path] and path not in _SAME:
                self._pools[path] = (
                    [case.body for case in made(document, path, GenerationMode.POSITIVE, number, seed=seed)],
                    [case.body for case in made(document, path, GenerationMode.NEGATIVE, number, seed=seed)],
                )

    def add(self, draw: Random, path: str, body: Body, *, broken: bool) -> None:
        """Set some fields to what was made by the document, or against it."""
        positive, negative = self._pools.get(_SAME.get(path, path), ([], []))
        pool = [each for each in (negative if broken else positive) if isinstance(each, dict) and each]
        if pool:
            source = draw.choice(pool)
            for name in draw.sample(sorted(source), min(len(source), draw.randint(1, 3))):
                body[name] = deepcopy(source[name])


def bodies(
    made_of: Made, paths: Sequence[str], number: int, seed: int, rendered: Sequence[tuple[Body, Body]] = ()
) -> list[Drawn]:
    """Return so many requests, the same for the same arguments.

    Args:
        made_of: The fields of the routes.
        paths: The routes.
        number: How many.
        seed: Of all choices.
        rendered: Requests of tokens as a server rendered them, without our fields and with them.
    """
    weights = [BASES[path][0] for path in paths]
    draws = [Random(f"{seed}/{i}") for i in range(number)]
    return [_one(made_of, draw, draw.choices(paths, weights)[0], rendered) for draw in draws]


def _one(made_of: Made, draw: Random, path: str, rendered: Sequence[tuple[Body, Body]]) -> Drawn:
    body = base(path, draw)
    kind = draw.choices(("bare", "apt", "made", "broken"), (4, 6, 2, 1))[0]
    if kind == "apt":
        add_apt(draw, path, sorted(made_of.fields[path]), body)
    elif kind != "bare":
        made_of.add(draw, path, body, broken=kind == "broken")
    tame(body)
    ours, right = ask_for_pruning(draw, path, body)
    if path == "/inference/v1/generate" and rendered and draw.random() < 0.4:
        plain, pruned = draw.choice(rendered)
        if draw.random() < 0.8:  # a budget comes too late for features, and is refused
            ours, right = deepcopy(body), False
        for each, features in ((body, plain), (ours, pruned)):
            each.pop("content_parts", None)
            each |= {name: features[name] for name in ("token_ids", "features")}
    return Drawn(path, body, ours, right)
