"""Results as a table, JSON or CSV, and a progress line: what every command prints through."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from pagedkv.config.sizes import format_size
from pagedkv.errors import ConfigError

FORMATS = ("table", "json", "csv")


def add_output_options(
    parser: argparse.ArgumentParser, default: str = "table on a terminal, json otherwise"
) -> None:
    """Add ``--format`` and ``--quiet``.

    Args:
        parser: of a command.
        default: what is printed without ``--format``, for the help.
    """
    group = parser.add_argument_group("output")
    group.add_argument(
        "--format",
        choices=FORMATS,
        help=f"how to print results (default: {default})",
    )
    group.add_argument("--quiet", action="store_true", help="no notes and no progress on stderr")


def choose_format(wanted: str | None) -> str:
    """The format asked for; else a table for a terminal and JSON for a pipe or a file."""
    return wanted or ("table" if sys.stdout.isatty() else "json")


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    Attributes:
        headings: of the columns.
        rows: cells, one per heading.
        left: columns that are aligned to the left; the others are numbers.
        title: printed above, if not empty.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset({0})
    title: str = ""

    def render(self) -> str:
        """The table as lines, columns two blanks apart."""
        cells = [list(self.headings), *map(list, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.headings))]
        lines = [self._line(row, widths) for row in cells]
        if not any(self.headings):
            del lines[0]
        return "\n".join([self.title, *lines] if self.title else lines)

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        padded = (
            cell.ljust(width) if i in self.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(padded).rstrip()


def facts(rows: Iterable[tuple[str, str]], title: str = "") -> Table:
    """A table of names and values, without headings."""
    return Table(("", ""), [list(row) for row in rows], frozenset({0, 1}), title)


def emit(
    form: str,
    document: Mapping[str, Any],
    tables: Sequence[Table],
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print one result on stdout.

    Args:
        form: ``"table"``, ``"json"`` or ``"csv"``.
        document: for JSON, raw numbers.
        tables: for people, a blank line apart.
        rows: for CSV; the document as one row, nested names joined by dots, if None.
    """
    if form == "json":
        print(json.dumps(document, indent=2))
    elif form == "csv":
        _write_csv(rows if rows is not None else [flatten(document)])
    else:
        print("\n\n".join(table.render() for table in tables))
    sys.stdout.flush()


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of names: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``; lists become JSON text."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        elif isinstance(value, (list, tuple)):
            flat[f"{prefix}{name}"] = json.dumps(value)
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _write_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(sys.stdout, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def write_json(path: str, document: Mapping[str, Any]) -> None:
    """Write a document to a file.

    Raises:
        ConfigError: if the file cannot be written.
    """
    try:
        with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123  # "/dev/stdout" as well
            json.dump(document, file, indent=2)
            file.write("\n")
    except OSError as e:
        raise ConfigError(f"cannot write {path!r}: {e.strerror}") from e


def number(value: int) -> str:
    """An integer with thousands separated."""
    return f"{value:,}"


def seconds(value: float) -> str:
    """A duration for reading: ``"850 ms"``, ``"12.3 s"``, ``"4 min 05 s"``."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def rate(nbytes: float, duration: float) -> str:
    """Bytes per second for reading; ``"-"`` if nothing was timed."""
    return f"{format_size(nbytes / duration)}/s" if duration > 0 else "-"


class Notes:
    """Lines for people on stderr, which ``--quiet`` switches off."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, line: str) -> None:
        """Say one line."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


class Progress:
    """One line on stderr that is rewritten as work goes on.

    It appears only on a terminal, and only for what takes longer than `delay` seconds; it is
    wiped away when it is closed.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "tokens",
        quiet: bool = False,
        delay: float = 2.0,
        stream: TextIO | None = None,
    ) -> None:
        """Start the clock.

        Args:
            label: what is being done.
            total: units in all.
            unit: what is counted.
            quiet: never show anything.
            delay: seconds before the line appears.
            stream: stderr if None.
        """
        self._label, self._total, self._unit = label, max(total, 1), unit
        self._stream = stream or sys.stderr
        self._shown = not quiet and self._stream.isatty()
        self._started = self._at = time.monotonic()
        self._due = self._started + delay
        self._drawn = False

    def update(self, done: int, note: str = "") -> None:
        """Show how far it is; cheap enough to call often.

        Args:
            done: units done.
            note: appended, such as how full the budgets are.
        """
        self._at = time.monotonic()
        if not self._shown or self._at < self._due:
            return
        self._due = self._at + 0.2
        line = self._line(done, note)[: shutil.get_terminal_size().columns - 1]
        self._stream.write(f"\r\x1b[2K{line}")
        self._stream.flush()
        self._drawn = True

    def _line(self, done: int, note: str) -> str:
        elapsed = self._at - self._started
        speed = done / elapsed if elapsed > 0 else 0.0
        parts = [
            f"{self._label} {done:,}/{self._total:,} {self._unit}",
            f"{100 * done // self._total}%",
            f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s",
        ]
        if speed > 0 and done < self._total:
            parts.append(f"{seconds((self._total - done) / speed)} left")
        return "  ".join([*parts, note] if note else parts)

    def close(self) -> None:
        """Wipe the line away."""
        if self._drawn:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
