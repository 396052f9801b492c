"""The folder that keeps what is made or downloaded once, for later runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$EMLOC_CACHE`, or `emloc` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EMLOC_CACHE") or Path(base) / "emloc")
