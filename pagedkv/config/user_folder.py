"""Where the user's cache is: what was made once and can be made again."""

from __future__ import annotations

import os
import pathlib


def cache_root() -> pathlib.Path:
    """Return `$PAGEDKV_CACHE`, `$XDG_CACHE_HOME/pagedkv` or `~/.cache/pagedkv`."""
    if own := os.environ.get("PAGEDKV_CACHE"):
        return pathlib.Path(own).expanduser().absolute()
    xdg = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else pathlib.Path.home() / ".cache") / "pagedkv"
