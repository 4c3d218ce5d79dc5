"""The seed blog's hyperparameters."""

import json
from pathlib import Path

BLOG: dict[str, str] = json.loads((
    Path(__file__).parents[1] / "support/golden/blog_hyperparameters.json").read_text("utf-8"))
