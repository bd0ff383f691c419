"""The report as one HTML file: it opens from disk, runs no script and loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from promprune_vllm.tuning import text
from promprune_vllm.tuning.chart import chart, legend
from promprune_vllm.tuning.pictures import MOST_IMAGES, Example, changed, examples, shown_images
from promprune_vllm.tuning.questions import Question
from promprune_vllm.tuning.summary import Summary

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_WORDS = ("method", "budget", "asked again below")


def page(summary: Summary, questions: Sequence[Question], overlays: Path) -> str:
    """Return the HTML.

    Args:
        summary: The figures.
        questions: The questions that were asked.
        overlays: Folder of the drawings of kept tokens.
    """
    css = (files("promprune_vllm") / "tuning" / "page.css").read_text(encoding="utf-8")
    body = "\n".join([*_advice(summary), *_figures(summary), *_changed(summary, questions, overlays)])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>A budget for your questions</title>
<style>
{css}</style>
</head>
<body>
<main>
<h1>A budget for {escape(str(summary.records.settings["server"]["model"]))}, on your questions</h1>
{body}
</main>
</body>
</html>
"""


def _advice(summary: Summary) -> list[str]:
    command = text.options(summary).replace(" --", " \\\n  --")  # or a browser breaks lines after hyphens
    notes = "".join(f"<li>{escape(note)}</li>" for note in text.reservations(summary))
    return [
        '<section class="advice" aria-label="Recommendation">',
        f'<p class="first">{escape(text.recommendation(summary))}</p>',
        f"<p>Start the server with:</p><pre><code>{escape(command)}</code></pre>",
        f"<ul>{notes}</ul>",
        "</section>",
    ]


def _figures(summary: Summary) -> list[str]:
    title = "By method and budget, never asked again"
    parts = [f"<h2>{title}</h2>", _table(title, text.HEAD, _rows(summary))]
    parts += [f'<p class="note">{escape(text.NOTE)}</p>', "<h2>Asking again</h2>"]
    parts += [f"<figure>{chart(summary)}<figcaption>{legend(summary)}</figcaption></figure>"]
    level, best = summary.level, text.level_row(summary)
    for row in summary.rows:
        if row.is_control or len(row.cells) < 2:
            continue
        title = f"{row.method}, first try {row.budget}, by threshold"
        again = [
            ("chosen" if cell == level else "", cells)
            for cell, cells in zip(row.cells, text.again_rows(row), strict=True)
        ]
        table = _table(title, text.AGAIN_HEAD, again)
        parts.append(
            f"<details{' open' if row is best else ''}><summary>{escape(title)}</summary>{table}</details>"
        )
    return parts


def _rows(summary: Summary) -> list[tuple[str, list[str]]]:
    """Return the rows of the table, each with its class."""
    level = text.level_row(summary)
    kinds = ["chosen" if row is level else "control" if row.is_control else "" for row in summary.rows]
    return list(zip(["", *kinds], text.rows(summary), strict=True))


def _table(label: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    shown = [any(cells[place] for _, cells in rows) for place in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{_class('word' if name in _WORDS else '')}>{escape(cell)}</{tag}>"
            for name, cell, there in zip(head, cells, shown, strict=True)
            if there
        )

    body = "".join(f"<tr{_class(kind)}>{line('td', cells)}</tr>" for kind, cells in rows)
    # Reachable with the keyboard, so that it can be scrolled on a narrow screen.
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(label)}"><table><thead><tr>'
        f"{line('th', head)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _changed(summary: Summary, questions: Sequence[Question], overlays: Path) -> list[str]:
    cell, shown = summary.level, examples(summary, questions)
    if cell is None:
        return []
    every = changed(summary, questions)
    mended = sum(example.again for example in every)
    what = f"{len(every)} of the first answers of {cell.method} with budget {cell.budget} changed."
    if cell.threshold:
        what += f" {mended} of them are asked again below {cell.threshold}: clients get the answer of all tokens."
    if len(shown) < len(every):
        what += f" These are {len(shown)} of them, first those that stay changed and lost most."
    parts = ["<h2>Changed answers</h2>", f"<p>{escape(what)}</p>"]
    return [*parts, *(_example(example, overlays) for example in shown)]


def _example(example: Example, overlays: Path) -> str:
    audit, question = example.audit, example.question
    confidence = f" (confidence {example.said.confidence:.3g}{', asked again' if example.again else ''})"
    told = [
        ("all tokens", example.full.text.strip()),
        (f"{example.said.kept} tokens", example.said.text.strip() + confidence),
    ]
    if question.answer is not None:
        told.append(("right answer", question.answer))
    if audit is not None and audit.tokens:
        told.append(("lost", f"{audit.nats / audit.tokens:.2f} nats per token"))
    answers = "".join(f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in told)
    images = "".join(
        _figure(url, f"{place}. image") + ("" if kept is None else _figure(kept, f"{place}. image, tokens kept"))
        for place, (url, kept) in enumerate(shown_images(example, overlays), 1)
    )
    left = len(question.images) - MOST_IMAGES
    more = f'<p class="note">{left} more images are not shown.</p>' if left > 0 else ""
    title = f"{question.text} ({question.id})"
    return f'<article><h3>{escape(title)}</h3><dl>{answers}</dl><div class="images">{images}</div>{more}</article>'


def _figure(url: str, caption: str) -> str:
    return f'<figure><img src="{url}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
