"""What was found out of a model, kept for the next process: files in the user's cache directory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pagedkv.config.user_folder import cache_root
from pagedkv.tiers.disk.whole_file import whole_file

FOLDER = "PAGEDKV_MODELS"
"""Names another folder than ``models`` in the user's cache directory."""


def note_path(fingerprint: str, what: str) -> Path | None:
    """Where something is kept of a model.

    Args:
        fingerprint: of the model.
        what: ends in the file's suffix.

    Returns:
        None where nothing is kept: the model has no name, or the user no home.
    """
    if not fingerprint:
        return None
    with suppress(RuntimeError):  # there is no home
        return Path(os.environ.get(FOLDER) or cache_root() / "models") / f"{fingerprint}-{what}"
    return None


def read_note(path: Path | None) -> bytes | None:
    """What is kept there; None if nothing is, or it cannot be read."""
    with suppress(OSError):
        return path.read_bytes() if path else None
    return None


def keep_note(path: Path | None, content: bytes) -> None:
    """Write it, complete or not at all; where that fails it is found out again next time."""
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content)
