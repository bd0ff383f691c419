"""``python -m deploy.documents`` writes every generated table into its page, and prints the pages it changed."""

from __future__ import annotations

from deploy.documents.blocks import PAGES, ROOT, write

for page in write(PAGES):
    print(page.relative_to(ROOT))
