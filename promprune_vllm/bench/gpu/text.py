"""A run's report as Markdown, and the tables that the documentation shares with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from promprune_vllm.bench.gpu.figures import Rows, figures
from promprune_vllm.markdown import table

_GIB, _MIB = 2**30, 2**20


def markdown(document: Mapping[str, Any]) -> str:
    """Render a report; what is not measured yet is named with its state."""
    found = figures(document)
    by = document["provenance"]
    parts = [
        f"# `bench gpu`, shape {document['shape']}, on {_machine(found['environment'], by)}",
        f"`{by['command']}`, commit {by['commit'] or 'unknown'}, {by['time']}, {document['minutes']:g} minutes at "
        f"most. {_progress(document)}",
        _stages(document["stages"]),
        *_section("Kernel tests", found["tests"], _tests),
        *_section("Selecting tokens", found["kernels"], kernels),
        *_section("Prefill", found["prefill"], prefill),
        *_section("vLLM", found["vllm"], vllm),
    ]
    return "\n\n".join(parts) + "\n"


def _machine(environment: Rows, by: Mapping[str, Any]) -> str:
    seen = environment.get("environment")
    if seen is None:
        return str(by["machine"])
    versions = ", ".join(f"{name} {version}" for name, version in seen["versions"].items())
    if seen["gpu"] is None:
        return f"{seen['machine']}, {seen['cores']} cores, no GPU ({versions})"
    memory = f"{seen['memory_bytes'] / _GIB:.0f} GiB"
    driver = f"driver {seen['driver'] or 'unknown'}, CUDA {seen['cuda']}"
    return f"{seen['gpu']} ({memory}, compute capability {seen['capability']}, {driver}; {versions})"


def _progress(document: Mapping[str, Any]) -> str:
    if document["ended"]:
        return f"It took {document['seconds']:.0f} s."
    return "**It has not ended**: this is what was measured until now."


def _stages(stages: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (stage["name"], stage["state"], f"{stage['seconds']:.1f}" if "seconds" in stage else "", _why(stage))
        for stage in stages
    ]
    return table(("stage", "state", "seconds", "why"), rows)


def _why(stage: Mapping[str, Any]) -> str:
    """Return the first and the last line of an error: a command, and what it ended with."""
    lines = stage.get("why", "").strip().splitlines()
    return " … ".join(lines if len(lines) < 3 else (lines[0], lines[-1]))


def _section(title: str, rows: Rows, render: Any) -> list[str]:
    return [f"## {title}", render(rows)] if rows else []


def _tests(rows: Rows) -> str:
    (one,) = rows.values()
    counts = ", ".join(f"{one[name]} {name}" for name in ("passed", "failed", "skipped"))
    return "\n".join([f"{counts}; `{one['command']}`", *(f"- failed: `{name}`" for name in one["failures"])])


def kernels(rows: Rows) -> str:
    """Render the times of selecting tokens, one line for each case and way."""
    columns = ("tokens x width : K", "what", "ms, median (min … max)", "tokens unlike float64", "memory, MiB")
    lines = []
    for case, row in rows.items():
        for name, times in row["times"].items():
            ours = name in {"ours", "eager", "graph"}
            unlike = str(row["other_tokens"]) if ours and row["other_tokens"] is not None else ""
            memory = f"{row['memory_bytes'] / _MIB:.0f}" if ours and row["memory_bytes"] is not None else ""
            lines.append((case, name, spread(times), unlike, memory))
    return table(columns, lines)


PREFILL_COLUMNS = (
    *("model", "visual tokens", "all, ms", "K, ms", "`promprune`, ms (saving kept)", "attention in it"),
    *("plain", "`divprune`", "`random`"),
)
"""The last ones are those of ``bench.prefill.SELECTIONS``; it is not imported, since torch takes seconds."""


def prefill(rows: Rows) -> str:
    """Render what of a prefill's gain selection leaves."""
    return table(PREFILL_COLUMNS, ((_scaled(row), *prefill_cells(row)) for row in rows.values()))


def prefill_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row after the model's name."""
    share, kept = row["attention_share"], row["saving_kept"]
    ours, *others = (
        f"{milliseconds(cost)} ({100 * kept[name]:.1f}%)" for name, cost in row["selection_ms"].items()
    )
    return (
        f"{row['tokens']} to {row['kept']}",
        milliseconds(row["full_ms"]),
        milliseconds(row["native_ms"]),
        ours,
        "-" if share is None else f"{100 * share:.0f}%",
        *others,
    )


def _scaled(row: Mapping[str, Any]) -> str:
    layers = (row["layers_run"], row["layers"])
    return str(row["model"]) + ("" if layers[0] == layers[1] else f", {layers[0]} of {layers[1]} layers run")


VLLM_COLUMNS = (
    *("in flight", "budget", "kept", "requests/s", "time to first token, p50", "p99"),
    *("KV blocks, mean", "most"),
)


def vllm(rows: Rows) -> str:
    """Render what vLLM does under load, with the engine's settings below."""
    engines = dict.fromkeys(engine(row) for row in rows.values())  # several, if rows are of several runs
    return "\n\n".join([table(VLLM_COLUMNS, map(vllm_cells, rows.values())), *engines])


def vllm_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of one load with one budget; ratios are to the first budget."""
    by = row["ratios"]
    return (
        str(row["concurrency"]),
        str(row["budget"]),
        f"{100 * row['kept_share']:.0f}%",
        f"{row['requests_per_second']:.2f} ({by['requests_per_second']:.2f}x)",
        f"{row['ttft_p50_ms']:.0f} ms ({by['ttft_p50_ms']:.2f}x)",
        f"{row['ttft_p99_ms']:.0f} ms",
        # A load always uses some: none were seen if it was over before the first look.
        *(f"{row[name]:,.0f}" if row[name] else "?" for name in ("kv_blocks_mean", "kv_blocks_max")),
    )


def engine(row: Mapping[str, Any]) -> str:
    """Return a sentence about the engine that served."""
    graphs = {True: "CUDA graphs", False: "no CUDA graphs", None: "CUDA graphs unknown"}[row["cuda_graphs"]]
    return (
        f"{row['model']} with random weights and {row['vocabulary']} tokens in its vocabulary, Model Runner "
        f"{row['model_runner'] or 'unknown'}, {graphs}, {row['kv_blocks']:,} KV blocks of {row['block_tokens']} "
        f"tokens; `{row['command']}`"
    )


def spread(times: Mapping[str, float]) -> str:
    """Return median, least and most of several times."""
    return f"{milliseconds(times['median'])} ({milliseconds(times['min'])} … {milliseconds(times['max'])})"


def milliseconds(value: float) -> str:
    """Return a time with about three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
