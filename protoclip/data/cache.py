"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$PROTOCLIP_CACHE``, else ``$XDG_CACHE_HOME/protoclip``, else ``~/.cache/protoclip``."""
    if chosen := os.environ.get("PROTOCLIP_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "protoclip"
