"""Where the trained demo model lies in the package."""

from importlib.resources import files
from pathlib import Path

TRAINED = Path(str(files(__package__) / "weights"))
CARD = TRAINED / "README.md"
SCORES = TRAINED / "scores.json"  # {"full": {task: per cent, ...}, "random 64": {...}, ...}
