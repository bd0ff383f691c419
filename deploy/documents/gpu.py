"""What `promprune bench gpu` has measured on GPUs, kept in docs/gpu.json and shown in the documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promprune_vllm.bench import prefill as widths
from promprune_vllm.bench.gpu import report, text
from promprune_vllm.bench.gpu.figures import Rows, figures
from promprune_vllm.bench.gpu.shapes import SHAPES
from promprune_vllm.errors import BenchError
from promprune_vllm.markdown import table

RESULTS = Path(__file__).parents[2] / "docs" / "gpu.json"
"""Table -> row -> figures, with the machine, commit and command behind them; missing before the first run."""

_ABSENT = "not measured yet"
_KERNEL_TARGETS = {
    "576x4096:64": "1.0 ms",
    "5x576x4096:64": "3.0 ms",
    "1296x3584:256": "2.0 ms, with received attention",
}
_MODELS = {
    "576x4096:64": "LLaVA-1.5-7B",
    "5x576x4096:64": "LLaVA-NeXT-7B",
    "1296x3584:256": "Qwen2.5-VL-7B",
    "1024x4096:256": "Qwen3-VL-8B",
}


def record(folder: Path, results: Path = RESULTS) -> list[str]:
    """Put the figures of a run beside earlier ones; a row measured again is replaced, the others stay.

    Args:
        folder: ``--out`` of the run.
        results: The file to write.

    Returns:
        The recorded rows, by table and name.

    Raises:
        BenchError: There is no report, it is a rehearsal's, or it does not say what GPU it is about.
    """
    document = report.read(folder)
    if (document["device"], document["shape"]) != ("cuda", "7b"):
        raise BenchError(
            f"{folder} is a rehearsal ({document['device']}, {document['shape']}), which shows nothing."
        )
    found = figures(document)
    environment = found.pop("environment").get("environment")
    if environment is None:
        raise BenchError(f"{folder} does not say which GPU was measured: its stage environment has no result.")
    rows = [f"{name} {row}" for name, each in found.items() for row in each]
    if not rows:
        raise BenchError(f"{folder} has no figures: no stage measured anything.")
    source = _source(document, environment)
    kept = read(results)
    for name, each in found.items():
        kept[name] = {**kept.get(name, {}), **{row: {**value, "source": source} for row, value in each.items()}}
    report.replace(results, json.dumps(kept, indent=2) + "\n")
    return rows


def read(results: Path = RESULTS) -> dict[str, Rows]:
    """Return what was recorded, by table and row; nothing before the first run."""
    if not results.is_file():
        return {}
    recorded: dict[str, Rows] = json.loads(results.read_text(encoding="utf-8"))
    return recorded


def _source(document: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: environment[name] for name in ("gpu", "capability", "driver", "cuda", "versions")}
    by = document["provenance"]
    return {**facts, **{name: by[name] for name in ("commit", "command", "time")}}


def sources(rows: Rows) -> str:
    """Name machine, versions, commit and command of rows; by row if they are not all of one run."""
    by: dict[str, list[str]] = {}
    for name, row in rows.items():
        by.setdefault(_described(row["source"]), []).append(name)
    if len(by) < 2:
        return "".join(f"Measured on {described}." for described in by)
    return "\n".join(f"* {', '.join(names)}: measured on {described}." for described, names in by.items())


def _described(source: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    return (
        f"{source['gpu']} (compute capability {source['capability']}, driver {source['driver'] or 'unknown'}, "
        f"CUDA {source['cuda']}; {versions}), commit {source['commit'] or 'unknown'}, {source['time'][:10]}: "
        f"`{source['command']}`"
    )


def kernel_tests_markdown(results: Path = RESULTS) -> str:
    """Render what the kernel tests found on a GPU."""
    rows = read(results).get("tests", {})
    if not rows:
        return (
            "**No GPU was available**: the kernels match the reference in Triton's interpreter and compile for "
            "compute capability\n8.9 and 9.0 (`make test`). Their speed is unknown."
        )
    (one,) = rows.values()
    counts = ", ".join(f"{one[name]} {name}" for name in ("passed", "failed", "skipped"))
    failures = "".join(f"\n* failed: `{name}`" for name in one["failures"])
    return f"The kernel tests on a GPU: {counts}. {sources(rows)}{failures}"


def kernels_markdown(results: Path = RESULTS) -> str:
    """Render the times of selecting tokens, with every expected case."""
    rows = read(results).get("kernels", {})
    columns = ("tokens x width : K", "eager, ms", "CUDA graph, ms", "plain torch, ms", "target on one H200")
    lines = []
    for case in dict.fromkeys((*SHAPES["7b"].kernels, *rows)):
        times = rows[case]["times"] if case in rows else {}
        cells = (_time(times, name) for name in ("eager", "graph", "plain"))
        lines.append((f"{case}, {_MODELS.get(case, '')}".rstrip(", "), *cells, _KERNEL_TARGETS.get(case, "-")))
        if "received attention, eager" in times:
            cells = (_time(times, f"received attention, {way}") for way in ("eager", "graph"))
            lines.append((f"{case}, received attention", *cells, "-", "-"))
    unlike = sum(row["other_tokens"] for row in rows.values())
    said = f"\n\nTokens kept that the float64 reference does not keep: {unlike}. {sources(rows)}" if rows else ""
    return table(columns, lines) + said


def _time(times: Mapping[str, Mapping[str, float]], name: str) -> str:
    return text.spread(times[name]) if name in times else _ABSENT


def prefill_markdown(results: Path = RESULTS) -> str:
    """Render what of a prefill's gain selection leaves, with every expected model."""
    rows = read(results).get("prefill", {})
    columns = (*text.PREFILL_COLUMNS, "target on one H200")
    lines = []
    for case in (widths.CASES[name] for name in SHAPES["7b"].prefill):
        unknown = (f"{case.groups * case.n} to {case.groups * case.keep}", _ABSENT, *("",) * (len(columns) - 4))
        cells = text.prefill_cells(rows[case.model]) if case.model in rows else unknown
        lines.append((case.model + (", with received attention" if case.patches else ""), *cells, "90%"))
    head = "On a GPU the selection time matters most" + (
        ":" if rows else ", and **it has not been measured yet**:"
    )
    return "\n\n".join([head, table(columns, lines), *([sources(rows)] if rows else [])])


def vllm_markdown(results: Path = RESULTS) -> str:
    """Render what vLLM does under load."""
    rows = read(results).get("vllm", {})
    if not rows:
        return "**vLLM has not run with this plugin on a GPU yet**, so its gain there is unknown."
    return f"{text.vllm(rows)}\n\n{sources(rows)}"


def coverage_markdown(results: Path = RESULTS) -> str:
    """Render for the page about compatibility what has run on a GPU."""
    kept = read(results)
    said = {
        "tests": "the tests of the Triton kernels",
        "kernels": "the selection",
        "vllm": "vLLM with a pruned model of random weights",
    }
    ran = [said[name] for name in said if kept.get(name)]
    machines = sorted({row["source"]["gpu"] for rows in kept.values() for row in rows.values()})
    if not ran:
        return "None of them has run on a GPU yet, and neither has vLLM with this plugin."
    return f"On {' and '.join(machines)} ran: {', '.join(ran)} ([results](methods.md#on-a-gpu))."


def summary_markdown(results: Path = RESULTS) -> str:
    """Render the README's sentences."""
    kept = read(results)
    case, where = SHAPES["7b"].kernels[0], "([on a GPU](docs/methods.md#on-a-gpu))"
    if not any(kept.values()):
        return (
            "The GPU kernels match the reference in Triton's interpreter, but **no GPU was available** to time "
            f"them {where}."
        )
    said = []
    if case in kept.get("kernels", {}):
        row = kept["kernels"][case]
        times = {name: text.milliseconds(row["times"][name]["median"]) for name in ("graph", "eager")}
        one = f"On one {row['source']['gpu']}"
        said.append(f"{one}, that takes {times['eager']} ms, or {times['graph']} ms from a CUDA graph.")
    else:
        said.append("Selection was not timed on a GPU yet.")
    said.append(_served(kept.get("vllm", {})) or "**What a budget gains in vLLM was not measured on a GPU yet**")
    return f"{' '.join(said)} {where}."


def _served(rows: Rows) -> str:
    """Return what a budget gains in the last load that one run measured with both budgets."""
    pairs = [(row, rows.get(f"{row['concurrency']} in flight, full")) for row in rows.values()]
    same = [
        (row, full)
        for row, full in pairs
        if full is not None and row["budget"] != "full" and row["source"] == full["source"]
    ]
    if not same:
        return ""
    row, full = same[-1]
    return (
        f"{row['model']} with random weights and {row['concurrency']} requests in flight on one "
        f"{row['source']['gpu']} answers {row['requests_per_second']:.1f} requests/s with a budget of "
        f"{row['budget']}, and {full['requests_per_second']:.1f} without; the first token comes after "
        f"{row['ttft_p50_ms']:.0f} ms instead of {full['ttft_p50_ms']:.0f} ms"
    )
