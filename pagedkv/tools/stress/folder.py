"""The directory of a stress run: for its store, and for what it saves."""

from __future__ import annotations

import tempfile

from pagedkv.tiers.disk.directory import require_parent
from pagedkv.tiers.disk.disk import RealDisk

STORE = "store"
"""In it: the directory of the store, and of nothing else."""


def run_folder(cold_dir: str | None) -> tempfile.TemporaryDirectory[str]:
    """Make one; it goes with `cleanup`, or at the latest when the process ends.

    Args:
        cold_dir: where; the temporary directory if None.

    Raises:
        ConfigError, UnsafeStoreError: if that is no directory to use.
    """
    parent = require_parent(cold_dir, RealDisk()) if cold_dir else None
    return tempfile.TemporaryDirectory(
        prefix="pagedkv-stress-", dir=parent, ignore_cleanup_errors=True
    )
