"""The measured figures in a report, by table and row, as the documents keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Rows = dict[str, dict[str, Any]]


def figures(document: Mapping[str, Any]) -> dict[str, Rows]:
    """Return table -> row -> figures, of what was measured, whether or not the stage came to its end.

    Tables: ``environment`` (one row), ``tests`` (one row), ``kernels`` (a row for each case), ``prefill`` (each
    model), ``vllm`` (each load and budget).
    """
    found: dict[str, Rows] = {name: {} for name in ("environment", "tests", "kernels", "prefill", "vllm")}
    for stage in document["stages"]:
        group, result = stage["name"].partition(" ")[0], stage.get("result")
        if result is None:
            continue
        if group in ("environment", "tests"):
            found[group][group] = result
        elif group == "kernels":
            found[group].update(_kernels(result))
        elif group == "prefill":
            found[group].update({row["model"]: row for row in result["cases"]})
        else:
            found[group].update(_vllm(result))
    return found


def _kernels(result: Mapping[str, Any]) -> Rows:
    return {
        row["case"]: {
            "times": row["whole"],
            "other_tokens": row.get("other_tokens"),
            "memory_bytes": row["memory_bytes"],
            "features": result["features"],
        }
        for row in result["cases"]
        if "whole" in row
    }


def _vllm(result: Mapping[str, Any]) -> Rows:
    shared = {name: value for name, value in result.items() if name != "rows"}
    return {f"{row['concurrency']} in flight, {row['budget']}": {**shared, **row} for row in result["rows"]}
