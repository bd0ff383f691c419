"""``python -m deploy.documents`` writes every generated table into its page, and prints the pages it changed.

``--gpu DIR`` first records what ``promprune bench gpu --out DIR`` has measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.documents import gpu
from deploy.documents.blocks import PAGES, ROOT, write
from promprune_vllm.errors import BenchError

parser = argparse.ArgumentParser(prog="python -m deploy.documents", description="Update the generated tables.")
parser.add_argument("--gpu", type=Path, metavar="DIR", help="record what `promprune bench gpu --out DIR` measured")
arguments = parser.parse_args()
if arguments.gpu is not None:
    try:
        recorded = gpu.record(arguments.gpu)
    except BenchError as error:
        sys.exit(str(error))
    print(f"{gpu.RESULTS.relative_to(ROOT)}: {', '.join(recorded)}")
for page in write(PAGES):
    print(page.relative_to(ROOT))
