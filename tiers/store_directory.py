"""The directories that cold files lie in: made, looked at before use, and removed."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path

from pagedkv.allocator import ConfigError
from pagedkv.tiers.disk import Disk, RealDisk
from pagedkv.tiers.files import again, remove_file


def private_directory(parent: str | Path | None, disk: Disk | None = None) -> Path:
    """Make a new directory that only this user can enter.

    Args:
        parent: where; the system's temporary directory if None. Created if it is missing.
        disk: the file system.

    Raises:
        ConfigError: if `parent` is a file, a symbolic link, or not writable.
    """
    disk = disk or RealDisk()
    if parent is not None:
        parent = Path(parent)
        if parent.is_symlink():
            raise ConfigError(
                f"cold_dir {str(parent)!r} is a symbolic link: name the directory it points to"
            )
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"cold_dir {str(parent)!r} is a file: name a directory")
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"cold_dir {str(parent)!r} cannot be created: {e.strerror}") from e
    where = parent or Path(tempfile.gettempdir())
    path = where / f"pagedkv-{secrets.token_hex(8)}"
    try:
        again(disk.mkdir, path)
    except OSError as e:
        raise ConfigError(
            f"cold_dir {str(where)!r} is not writable ({e.strerror}): choose another with cold_dir="
        ) from e
    return path


def remove_directory(path: Path, disk: Disk | None = None) -> None:
    """Delete a directory made by `private_directory`; what cannot be deleted stays."""
    disk = disk or RealDisk()
    try:
        for name in again(disk.list, path):
            remove_file(disk, path / name)
        again(disk.rmdir, path)
    except OSError:
        pass
