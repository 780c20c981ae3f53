"""Rows as tables: the columns of each leg, for a terminal and for a page of documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pagedkv.config.sizes import format_size
from pagedkv.tools.bench.report import MISSING, Column, markdown_table
from pagedkv.tools.bench.result import OK, Row
from pagedkv.tools.bench.settings import short_tokens
from pagedkv.tools.evaluation.result import RETRIEVAL, summary
from pagedkv.tools.evaluation.retrieval_report import retrieval_report
from pagedkv.tools.evaluation.retrieval_result import RetrievalResult
from pagedkv.tools.evaluation.settings import DECODE, LEGS, PREFILL
from pagedkv.tools.evaluation.variants import REFERENCE

Format = Callable[[float], str]

TITLES = {
    PREFILL: "Prefill: the text in chunks",
    DECODE: "Decode: the text's last tokens one by one",
}


def small(value: float) -> str:
    """Two digits, for what may be tiny: ``"0.0014"``, ``"2.1e-06"``, ``"0"``."""
    return f"{value:.2g}"


def signed(value: float) -> str:
    """A difference in percent: ``"+0.24"``, ``"-0.01"``, from 100 on ``"+344"``."""
    return f"{value:+.0f}" if abs(value) >= 100 else f"{value:+.2f}"


def _fixed(digits: int) -> Format:
    return lambda value: f"{value:,.{digits}f}"


def _text(name: str, heading: str) -> Column:
    return Column(heading, lambda row: str(row.get(name, "")), always=True, left=True)


def _number(name: str, heading: str, form: Format, of_reference: bool = False) -> Column:
    """A number, and where segments differ their mean with the extremes behind it."""

    def text(row: Row) -> str:
        if row["kind"] == REFERENCE and not of_reference:
            return ""
        if row.get(name) is None:
            return ""
        low, high = row.get(f"{name}_min"), row.get(f"{name}_max")
        if low is None or high is None or form(low) == form(high):
            return form(row[name])
        return f"{form(row[name])} ({form(low)} to {form(high)})"

    return Column(heading, text)


def _interval(name: str) -> Column:
    def text(row: Row) -> str:
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        return f"{small(low)} to {small(high)}" if low is not None and high is not None else ""

    return Column("95 %", text)


_HEAD = (
    _text("text", "text"),
    _text("what", "cache"),
    _number("bits", "bits", _fixed(2), of_reference=True),
    _number("bytes_per_token", "bytes/token", _fixed(0), of_reference=True),
    Column("memory", lambda row: format_size(int(row["cache_bytes"]))),
    _number("perplexity", "perplexity", _fixed(3), of_reference=True),
    _number("perplexity_percent", "%", signed),
    _number("kl_mean", "KL", small),
    _number("kl_p99", "p99", small),
)
_TOP = _number("top1_percent", "top-1 %", _fixed(2))

COLUMNS: dict[str, tuple[Column, ...]] = {
    PREFILL: (
        *_HEAD,
        _number("kl_max", "max", small),
        _TOP,
        _number("flips", "flips", _fixed(0)),
        Column("seconds", lambda row: "" if row["kind"] == REFERENCE else f"{row['seconds']:.1f}"),
        _text("note", "note"),
    ),
    DECODE: (
        *_HEAD,
        _TOP,
        _number("slope_per_1000", "KL per 1,000 tokens", small),
        _interval("slope_per_1000"),
        _number("added_slope_per_1000", "beside prefill", small),
        _interval("added_slope_per_1000"),
        _text("note", "note"),
    ),
}
"""Of each leg. Numbers are over positions whose context reaches beyond what is always in 16 bit."""


def cells(leg: str, rows: Sequence[Row]) -> tuple[list[Column], list[list[str]]]:
    """A leg's columns, empty ones left out, and its rows as text, segments summed up.

    Args:
        leg: a key of `COLUMNS`.
        rows: of any leg.
    """
    mine = summary([row for row in rows if row["leg"] == leg])
    columns = [c for c in COLUMNS[leg] if any(c.cell(row) != MISSING for row in mine)]
    return columns, [[column.cell(row) for column in columns] for row in mine]


def title(leg: str, rows: Sequence[Row]) -> str:
    """What a leg's table is about, in words."""
    measured = [row for row in summary(rows) if row["leg"] == leg and row["status"] == OK]
    if not measured:
        return f"{TITLES[leg]}: nothing was measured"
    one = measured[0]
    words = f"{TITLES[leg]}, {one['model']}, {one['tokens']:,} tokens"
    if "first_position" in one:
        words += f", positions from {one['first_position']:,} on"
    if one["segments"] > 1:
        words += f", mean of {one['segments']} segments (least to most)"
    return words


def markdown(leg: str, rows: Sequence[Row]) -> str:
    """A leg's rows as a Markdown table; empty if there are none."""
    columns, lines = cells(leg, rows)
    if not lines:
        return ""
    heads = [column.heading for column in columns]
    return markdown_table(heads, lines, {i for i, column in enumerate(columns) if column.left})


def page(document: dict[str, Any]) -> str:
    """A result in Markdown: a paragraph and a table for each leg, and what retrieval tasks show."""
    rows = document["rows"]
    parts = [f"{title(leg, rows)}:\n\n{table}" for leg in LEGS if (table := markdown(leg, rows))]
    if RETRIEVAL in document:
        result = RetrievalResult.from_dict(document[RETRIEVAL])
        words = retrieval_title(document["settings"]["model"], result)
        parts.append(f"{words}.\n\n{retrieval_report(result).rstrip()}")
    return "\n\n".join(parts) + "\n"


def retrieval_title(model: str, result: RetrievalResult) -> str:
    """What the tables of retrieval tasks are about, in words."""
    lengths = ", ".join(map(short_tokens, result.grid.lengths))
    return f"Retrieval: facts hidden in a text and asked for, {model}, {lengths} tokens"
