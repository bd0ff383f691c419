"""``python -m deploy.documents`` writes every generated table into its page, and prints the pages it changed.

``--gpu DIR`` first records what ``promprune bench gpu --out DIR`` has measured, and ``--eval DIR`` shows what
``promprune eval --out DIR`` has; ``--clips DIR`` what ``promprune eval --clips N --out DIR`` has.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.documents import evaluation, gpu
from deploy.documents.blocks import PAGES, ROOT, replace, write
from promprune_vllm.errors import BenchError, EvaluationError

parser = argparse.ArgumentParser(prog="python -m deploy.documents", description="Update the generated tables.")
parser.add_argument("--gpu", type=Path, metavar="DIR", help="record what `promprune bench gpu --out DIR` measured")
parser.add_argument("--eval", type=Path, metavar="DIR", help="show what `promprune eval --out DIR` measured")
parser.add_argument(
    "--only", default="", metavar="BLOCKS", help="with --eval: show only these blocks, such as checks"
)
parser.add_argument("--clips", type=Path, metavar="DIR", help="show what `promprune eval --clips N --out DIR` did")
arguments = parser.parse_args()
if arguments.gpu is not None:
    try:
        recorded = gpu.record(arguments.gpu)
    except BenchError as error:
        sys.exit(str(error))
    print(f"{gpu.RESULTS.relative_to(ROOT)}: {', '.join(recorded)}")
measured = []
if arguments.eval is not None:
    try:
        measured = replace(
            PAGES, evaluation.render(arguments.eval, arguments.only.split(",") if arguments.only else ())
        )
    except EvaluationError as error:
        sys.exit(str(error))
    if not arguments.only:
        measured += evaluation.copy_plots(arguments.eval, ROOT / "docs" / "images")
if arguments.clips is not None:
    measured += replace(PAGES, evaluation.render_clips(arguments.clips))
    measured += evaluation.copy_plots(arguments.clips, ROOT / "docs" / "images")
for page in (*measured, *write(PAGES)):
    print(page.relative_to(ROOT))
