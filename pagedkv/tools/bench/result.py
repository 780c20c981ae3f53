"""Rows of a result, and the file that they are written to one by one."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

import pagedkv
from pagedkv.errors import ConfigError
from pagedkv.integrations import blas

SCHEMA = 1
NAME = "pagedkv bench"
_IDENTITY = ("device", "backend", "mlx", "mlx_lm", "pagedkv", "source", "blas")
OK, FAILED, SKIPPED = "ok", "failed", "skipped"

Row = dict[str, Any]
"""One measurement. Every row has ``part``, ``depth``, ``what``, ``status`` and ``note``; rows of
attention have ``shape`` and ``queries``, the others ``model``. Times carry their unit in their
name, with ``_p10`` and ``_p90`` beside the median; ``bytes`` must be read; ``achieved`` is the
roofline over the time; ``limit`` is what bounds the row; ``times_fp16`` is the fp16 row's time over
its own.

In rows of decode, ``turns`` says whose blocks of steps alternated: ``"all"``, ``"pairs"`` (fp16's
and this one's) or ``"runs"`` (nobody's). ``time_of_fp16`` is the median of its blocks' times, each
over that of fp16's block in the same round, with ``_p10`` and ``_p90``; for ``"runs"`` it is a
ratio of medians, without them. ``times_fp16`` is its inverse. ``blocks`` and ``steps`` count what
was timed."""


def succeeded(row: Row) -> Row:
    """The row, marked as measured."""
    return {**row, "status": OK, "note": row.get("note", "")}


def failed(row: Row, note: str) -> Row:
    """The row, marked as one that could not be measured."""
    return {**row, "status": FAILED, "note": note}


def skipped(row: Row, note: str) -> Row:
    """The row, marked as one that was not tried, for lack of time."""
    return {**row, "status": SKIPPED, "note": note}


def first_words(error: BaseException, most: int = 100) -> str:
    """The beginning of an error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 1]}…"


def group_of(row: Row) -> tuple[Any, ...]:
    """What was measured together with a row: part, shape or model, depth, query tokens."""
    return (row["part"], row.get("model") or row["shape"], row["depth"], row.get("queries"))


def describe_machine() -> dict[str, Any]:
    """Device, memory, system and versions, as text and numbers."""
    info = mx.device_info()
    gpu = mx.default_device() == mx.gpu
    return {
        "device": str(info.get("device_name", platform.processor())),
        "gpu": bool(gpu),
        "backend": "metal" if gpu and mx.metal.is_available() else "cuda" if gpu else "cpu",
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "mlx": _version("mlx") or getattr(mx, "__version__", None),
        "mlx_lm": _version("mlx-lm"),
        "pagedkv": pagedkv.__version__,
        "source": _source_digest(),
        "blas": ", ".join(blas.in_use()) or None,
    }


def _source_digest() -> str:
    """Names the code that was measured: a version number says little between releases."""
    root = Path(pagedkv.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.glob("**/*.py")):
        place = path.relative_to(root).as_posix()
        if not place.startswith(("bench/", "evaluation/", "cli/")):
            digest.update(place.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Result:
    """A run's machine, settings and rows; a file of them is rewritten after every row.

    Attributes:
        rows: so far.
    """

    def __init__(self, settings: Mapping[str, Any], path: Path | None = None) -> None:
        """Start a result.

        Args:
            settings: of the run, for the record.
            path: of the file; none is written if None. Its folder is made if need be.

        Raises:
            OSError: if the folder cannot be made.
        """
        self._path = path
        self._head: dict[str, Any] = {
            "schema": SCHEMA,
            "benchmark": NAME,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "settings": dict(settings),
        }
        self.rows: list[Row] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def resume(self, earlier: Path | None = None) -> int:
        """Take over the rows of an earlier run; groups it had no time for aside.

        Args:
            earlier: file of that run, if it is not the one that is written.

        Returns:
            How many rows that were; 0 if there is no file.

        Raises:
            ConfigError: if the file is of another machine, or of other versions of the code.
        """
        path = earlier or self._path
        if path is None or not path.exists():
            return 0
        before = read_result(path)
        now, then = self._head["machine"], before["machine"]
        differ = [name for name in _IDENTITY if now[name] != then.get(name)]
        if differ:
            raise ConfigError(
                f"{str(path)!r} was measured elsewhere ({', '.join(differ)} differ): rows of "
                f"two machines or versions do not belong in one file; give another folder"
            )
        again = {group_of(row) for row in before["rows"] if row["status"] == SKIPPED}
        self.rows = [row for row in before["rows"] if group_of(row) not in again]
        return len(self.rows)

    def has(self, group: tuple[Any, ...]) -> bool:
        """Whether a group was measured already; see `group_of`."""
        return any(group_of(row) == group for row in self.rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows and write the file."""
        self.rows += rows
        if self._path is None:
            return
        draft = self._path.with_suffix(".part")
        draft.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")
        draft.replace(self._path)

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**self._head, "rows": self.rows}


def read_result(path: Path, benchmark: str = NAME, schema: int = SCHEMA) -> dict[str, Any]:
    """Read a result file.

    Args:
        path: of the file.
        benchmark: the command that wrote it.
        schema: of its results.

    Raises:
        ConfigError: if it cannot be read, or is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read the result {str(path)!r}: {first_words(e)}") from e
    if not isinstance(document, dict) or document.get("benchmark") != benchmark:
        raise ConfigError(f"{str(path)!r} is no result of {benchmark}")
    if document.get("schema") != schema:
        raise ConfigError(f"{str(path)!r} has schema {document.get('schema')}, not {schema}")
    return document
