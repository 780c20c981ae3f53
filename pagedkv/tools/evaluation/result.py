"""Rows of a comparison, and the files they are written to."""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.errors import ConfigError
from pagedkv.tools.bench import result as bench_result
from pagedkv.tools.bench.result import OK, SKIPPED, Row, describe_machine
from pagedkv.tools.evaluation.metrics import Series
from pagedkv.tools.evaluation.retrieval_comparison import compare
from pagedkv.tools.evaluation.retrieval_result import RetrievalResult

SCHEMA = 1
NAME = "pagedkv eval"
RESULT_FILE = "result.json"
POSITIONS = "-positions.npz"
"""Follows the name of the result's file."""
RETRIEVAL = "retrieval"
"""Part of the file that retrieval tasks are in, and what they are called beside legs."""
IDENTITY = ("device", "backend", "mlx", "mlx_lm", "pagedkv", "source")
KEY = ("model", "text", "leg", "what")
SUMMED_UP = (
    *("perplexity", "perplexity_reference", "perplexity_percent", "kl_mean", "kl_p99", "kl_max"),
    *("top1_percent", "flips", "slope_per_1000", "added_slope_per_1000"),
    *("bits", "bytes_per_token", "cache_bytes", "fp16_bytes", "seconds"),
)
"""Numbers whose mean and extremes over segments are worth having."""


class Result:
    """A run's machine, settings and rows; its files are rewritten whenever rows come.

    Attributes:
        rows: so far: one per text, segment, leg and variant.
        retrieval: outcomes of retrieval tasks so far; None if there are none.
    """

    def __init__(
        self, settings: Mapping[str, Any], folder: Path | None = None, file: str = RESULT_FILE
    ) -> None:
        """Start a result.

        Args:
            settings: of the run, for the record: model, texts, command and what else decides.
            folder: for the files; none are written if None. Made if need be.
            file: name of the JSON file in it.

        Raises:
            OSError: if the folder cannot be made.
        """
        self._folder, self._file = folder, file
        self._head: dict[str, Any] = {
            "schema": SCHEMA,
            "benchmark": NAME,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "settings": dict(settings),
        }
        self.rows: list[Row] = []
        self.retrieval: RetrievalResult | None = None
        self._positions: dict[str, Any] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> int:
        """Take over what an earlier run wrote to the same file, but for unfinished legs.

        Returns:
            How many rows and outcomes of retrieval tasks that were; 0 if there is no file.

        Raises:
            ConfigError: if the file is of another machine, version or way to measure.
        """
        path = None if self._folder is None else self._folder / self._file
        if path is None or not path.exists():
            return 0
        before = read_result(path)
        differ = [name for name in IDENTITY if self._machine[name] != before["machine"].get(name)]
        mine, theirs = json.loads(json.dumps(self._head["settings"])), before["settings"]
        differ += sorted(k for k in {*mine, *theirs} - {"command"} if mine.get(k) != theirs.get(k))
        if differ:
            raise ConfigError(
                f"{str(path)!r} was measured differently ({', '.join(differ)}): give another folder"
            )
        rows = before["rows"]
        again = {_leg(row) for row in rows if row["status"] == SKIPPED or row.get("cut_short")}
        self.rows = [row for row in rows if _leg(row) not in again]
        if RETRIEVAL in before:
            self.retrieval = RetrievalResult.from_dict(before[RETRIEVAL])
        return len(self.rows) + (len(self.retrieval.outcomes) if self.retrieval else 0)

    @property
    def _machine(self) -> dict[str, Any]:
        machine: dict[str, Any] = self._head["machine"]
        return machine

    def has(self, head: Row) -> bool:
        """Whether a leg of a segment is there already.

        Args:
            head: of its rows: text, segment and leg.
        """
        return any(_leg(row) == _leg(head) for row in self.rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows and write the file."""
        self.rows += rows
        self.write()

    def write(self) -> None:
        """Write the file, if there is a folder: the old one is replaced in one step."""
        if self._folder is not None:
            path = self._folder / self._file
            draft = path.with_suffix(".part")
            draft.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")
            draft.replace(path)

    def keep(self, row: Row, series: Series) -> None:
        """Remember a row's numbers of every position, for `write_positions`."""
        name = "/".join(str(row[part]) for part in ("text", "segment", "leg", "what"))
        self._positions[f"{name}/kl"] = series.kl.astype(np.float32)
        self._positions[f"{name}/loss"] = series.loss.astype(np.float32)
        self._positions[f"{name}/flips"] = series.flips.astype(bool)

    def write_positions(self) -> None:
        """Write what was kept, as arrays that numpy loads by name."""
        if self._folder is not None and self._positions:
            path = self._folder / f"{Path(self._file).stem}{POSITIONS}"
            np.savez_compressed(path, **self._positions)

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        document = {**self._head, "rows": self.rows, "summary": summary(self.rows)}
        if self.retrieval is not None:
            compared = [comparison.to_dict() for comparison in compare(self.retrieval)]
            document[RETRIEVAL] = {**self.retrieval.to_dict(), "comparisons": compared}
        return document


def _leg(row: Row) -> tuple[Any, ...]:
    return row["text"], row["segment"], row["leg"]


def summary(rows: Sequence[Row]) -> list[Row]:
    """Rows of all segments of a text as one: means, with ``_min`` and ``_max`` beside them.

    Args:
        rows: of any texts, legs and variants, in their order.

    Returns:
        One row per model, text, leg and variant; where only one segment was measured, that
        segment's row without extremes.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in KEY), []).append(row)
    return [_one(group) for group in groups.values()]


def _one(group: Sequence[Row]) -> Row:
    measured = [row for row in group if row["status"] == OK]
    head = {k: v for k, v in (measured or group)[0].items() if k != "kl_binned"}
    if len(measured) < 2:
        return {**head, "segments": len(measured)}
    row: Row = {**head, "segment": None, "segments": len(measured)}
    for name in [name for base in SUMMED_UP for name in (base, f"{base}_all")]:
        values = [each[name] for each in measured if each.get(name) is not None]
        if values:
            row[name] = statistics.fmean(values)
            row[f"{name}_min"], row[f"{name}_max"] = min(values), max(values)
    for name, end in itertools.product(("slope", "added_slope"), ("low", "high")):
        row.pop(f"{name}_per_1000_{end}", None)  # of one segment's line
    return row


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file; see `pagedkv.tools.bench.read_result`."""
    return bench_result.read_result(path, NAME, SCHEMA)
