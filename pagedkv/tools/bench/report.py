"""Rows as tables: the columns of each part, for a terminal and for a page of documentation."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from pagedkv.config.sizes import format_size
from pagedkv.tools.bench.result import OK, Row
from pagedkv.tools.bench.settings import short_tokens

MISSING = "-"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: with its unit.
        text: of a measured row's cell.
        always: whether rows that were not measured have it too.
        left: aligned to the left.
    """

    heading: str
    text: Callable[[Row], str]
    always: bool = False
    left: bool = False

    def cell(self, row: Row) -> str:
        """The cell; a dash where there is nothing."""
        if row["status"] != OK and not self.always:
            return MISSING
        return self.text(row) or MISSING


def digits(value: float | None) -> str:
    """Three digits, without an exponent: ``"0.0123"``, ``"4.56"``, ``"12,345"``."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], left: Container[int]
) -> str:
    """Rows of text as a Markdown table.

    Args:
        headings: of the columns.
        rows: cells, one per heading.
        left: columns that are aligned to the left; the others are numbers.
    """
    rule = ["---" if i in left else "---:" for i in range(len(headings))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *rows))


def _text(name: str, heading: str | None = None) -> Column:
    return Column(heading or name, lambda row: str(row.get(name, "")), always=True, left=True)


def _number(name: str, heading: str) -> Column:
    return Column(heading, lambda row: digits(row.get(name)))


def _ratio(name: str, heading: str) -> Column:
    return Column(heading, lambda row: f"{row[name]:.2f}x" if row.get(name) else "")


def _share(name: str, heading: str) -> Column:
    return Column(heading, lambda row: f"{row[name]:.2f}")


def _percent(name: str, heading: str) -> Column:
    return Column(heading, lambda row: f"{100 * row[name]:.0f}%")


def _bytes(name: str, heading: str) -> Column:
    return Column(heading, lambda row: format_size(row[name]))


def _spread(name: str) -> Column:
    def text(row: Row) -> str:
        return f"{digits(row[f'{name}_p10'])}-{digits(row[f'{name}_p90'])}"

    return Column("p10-p90", text)


def _speed_spread() -> Column:
    def text(row: Row) -> str:
        low, high = row.get("time_of_fp16_p90"), row.get("time_of_fp16_p10")
        return f"{1 / low:.2f}-{1 / high:.2f}x" if low and high else ""

    return Column("speed p10-p90", text)


_DEPTH = Column("tokens", lambda row: short_tokens(row["depth"]), always=True)
_END = (_bytes("bytes", "reads"),)
_LAST = (_percent("achieved", "of it"), _text("limit"), _text("note"))

_ROUNDS = (
    Column("rounds", lambda row: f"{row['rounds']} of {row['rounds_made']}"),
    _percent("others", "others' CPU"),
    _text("note"),
)

_ATTENTION = (
    _text("shape"),
    _DEPTH,
    _text("what", "attention"),
    _number("us", "µs"),
    _spread("us"),
    _number("single_us", "one call µs"),
    _ratio("times_fp16", "speed"),
    *_END,
    _number("roofline_us", "roofline µs"),
    *_LAST,
)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "attention": _ATTENTION,
    "paged": _ATTENTION,
    "decode": (
        _text("model"),
        _DEPTH,
        _text("what", "cache"),
        _number("ms", "ms/token"),
        _spread("ms"),
        _ratio("times_fp16", "speed"),
        _speed_spread(),
        Column("turns", lambda row: row.get("turns", ""), left=True),
        _bytes("cache_bytes", "memory"),
        _ratio("cache_of_fp16", "of fp16's"),
        _bytes("active_bytes", "active"),
        _bytes("peak_bytes", "peak"),
        _bytes("fill_peak_bytes", "filling"),
        *_END,
        _number("roofline_ms", "roofline ms"),
        *_LAST,
    ),
    "prefill": (
        _text("model"),
        _DEPTH,
        _text("what", "cache"),
        _number("s", "seconds"),
        _number("tokens_per_s", "tokens/s"),
        _ratio("times_fp16", "speed"),
        _bytes("peak_bytes", "peak"),
        _ratio("peak_of_fp16", "peak of fp16's"),
        *_END,
        _number("roofline_s", "roofline s"),
        *_LAST,
    ),
    "seal": (
        _text("model"),
        _text("what", "pages"),
        _number("ns_per_vector", "ns/vector"),
        _spread("ns_per_vector"),
        _number("roofline_ns", "roofline ns"),
        *_LAST,
    ),
    "reads": (
        _text("what", "requests"),
        _number("plain_mb_per_s", "plain MB/s"),
        _spread("plain_mb_per_s"),
        _number("store_mb_per_s", "store MB/s"),
        _spread("store_mb_per_s"),
        _share("share", "of plain"),
        _spread("share"),
        *_ROUNDS,
    ),
    "overlap": (
        _text("shape"),
        _DEPTH,
        _text("what", "pages"),
        _bytes("cold_bytes", "on disk"),
        _number("read_ms", "reading ms"),
        _number("attend_ms", "attending ms"),
        _number("both_ms", "both ms"),
        _share("overlap", "overlap"),
        _spread("overlap"),
        _text("blas_threads", "BLAS threads"),
        *_ROUNDS,
    ),
    "eviction": (
        _text("shape"),
        _DEPTH,
        _text("what", "pages"),
        _number("plain_p50_ms", "p50 ms"),
        _number("plain_p99_ms", "p99 ms"),
        _number("evicting_p50_ms", "evicting p50 ms"),
        _number("evicting_p99_ms", "p99 ms"),
        _number("written_mb_per_s", "written MB/s"),
        _share("p50", "p50 ratio"),
        _share("p99", "p99 ratio"),
        _spread("p99"),
        *_ROUNDS,
    ),
}
"""Of each part; ``speed`` is the baseline's time over the row's."""

TITLES = {
    "attention": "Attention alone",
    "paged": "Short contexts in pages",
    "decode": "Decode",
    "prefill": "Prefill",
    "seal": "Sealing",
    "reads": "Reads from disk",
    "overlap": "Reading while attending",
    "eviction": "Decode steps while pages are evicted",
}


def cells(part: str, rows: Iterable[Row]) -> tuple[list[Column], list[list[str]]]:
    """A part's columns, empty ones left out, and its rows as text.

    Args:
        part: a key of `COLUMNS`.
        rows: of any part.
    """
    mine = [row for row in rows if row["part"] == part]
    columns = [c for c in COLUMNS[part] if any(c.cell(row) != MISSING for row in mine)]
    return columns, [[column.cell(row) for column in columns] for row in mine]


def yardstick_line(rows: Sequence[Row]) -> str:
    """The copy bandwidth and launch cost that rows were held against, in words."""
    measured = [row for row in rows if row["status"] == OK]
    if not measured:
        return "nothing was measured"
    if "others" in measured[0]:
        return _quiet_line(measured)
    copies = sorted(row["copy_gb_per_s"] for row in measured)
    links = sorted(row["link_us"] for row in measured)
    return (
        f"copy bandwidth {_range(copies)} GB/s (read and written), "
        f"an empty kernel {_range(links)} µs"
    )


def _quiet_line(measured: Sequence[Row]) -> str:
    """How quiet the machine was while the disk was measured, in words."""
    shares = [100 * row["others"] for row in measured]
    words = f"other programs took {_range(sorted(shares))} % of the processors"
    threads = {row["threads"] for row in measured if "threads" in row}
    return f"{words}; {max(threads)} reading threads" if threads else words


def _range(ordered: Sequence[float]) -> str:
    low, high = digits(ordered[0]), digits(ordered[-1])
    return low if low == high else f"{low}-{high}"


def markdown(part: str, rows: Iterable[Row]) -> str:
    """A part's rows as a Markdown table; empty if there are none."""
    columns, lines = cells(part, rows)
    if not lines:
        return ""
    heads = [column.heading for column in columns]
    return markdown_table(heads, lines, {i for i, column in enumerate(columns) if column.left})
