"""What the task beside this file calls, inside lmms-eval: knows nothing of ours."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(doc["image"]))).convert("RGB")]
