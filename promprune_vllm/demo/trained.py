"""Paths of the trained demo model in the package."""

from importlib.resources import files
from pathlib import Path

TRAINED = Path(str(files(__package__) / "weights"))
CARD = TRAINED / "README.md"
SCORES = TRAINED / "scores.json"  # {"full": {task: percent, ...}, "random 64": {...}, ...}
