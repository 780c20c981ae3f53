"""A stress report for people, and its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pagedkv.cli.options import user_path
from pagedkv.cli.output import Table, facts, number, seconds, write_json
from pagedkv.config.sizes import format_size
from pagedkv.errors import ConfigError
from pagedkv.tools.stress import Check, StressReport, plots

_CONTENTS = ("needle answers", "needles found", "stored tokens", "saved and loaded")
_NEEDLES = 16  # in the table; the JSON has them all


def tables(report: StressReport) -> list[Table]:
    """For people."""
    rows = [[c.name, _status(c), number(c.count), _worst(c), _detail(c)] for c in report.checks]
    found = [Table(("check", "status", "looks", "worst", "detail"), rows, frozenset({0, 1, 4}))]
    if report.needles:
        found.append(_needles(report.needles))
    if report.faults:
        found.append(_faults(report.faults))
    return [*found, _latencies(report), _memory(report), facts(_facts(report))]


def _needles(needles: Sequence[dict[str, Any]]) -> Table:
    names = ("token", "tier", "precision", "asked", "error", "cosine")
    every = -(-len(needles) // _NEEDLES)
    cells = [[_cell(needle[name]) for name in names] for needle in needles[::every]]
    title = "needles, worst of all heads" + (f" (every {every}th)" if every > 1 else "")
    return Table(names, cells, frozenset({1, 2}), title)


def _faults(faults: dict[str, Any]) -> Table:
    names = ("kind", "injected", "detected", "absorbed")
    cells = [[_cell(row[name]) for name in names] for row in faults["kinds"]]
    errors = ", ".join(f"{name} {count}" for name, count in faults["errors"].items()) or "none"
    title = f"faults: errors raised: {errors}; pages made again: {faults['pages_made_again']}"
    return Table(names, cells, frozenset({0}), title)


def _latencies(report: StressReport) -> Table:
    rows = [
        [row["kind"], number(row["count"]), *(seconds(row[name]) for name in ("p50", "p99", "max"))]
        for row in report.latencies.summary()
    ]
    title = "steps of the cache, all layers, without the harness"
    return Table(("step", "count", "p50", "p99", "max"), rows, frozenset({0}), title)


def _memory(report: StressReport) -> Table:
    """Budgets plus the constant, part by part, and what was taken."""
    memory = report.memory
    rows = [[name, format_size(nbytes)] for name, nbytes in memory.limits.items()]
    rows.insert(
        0, ["interpreter, MLX, libraries (measured before the run)", format_size(memory.base)]
    )
    rows.append(["allowed in all", format_size(memory.allowed)])
    rows.append(
        [f"most the process took ({number(memory.looked)} looks)", _peak(memory, "process")]
    )
    for name, label in (
        ("resident", "most that was resident, by the system's account"),
        ("mlx_peak", "MLX, peak"),
        ("mlx_active", "MLX, most active at a sample"),
        ("mlx_cache", "MLX, most freed buffers kept"),
    ):
        if name in memory.peaks:
            rows.append([label, _peak(memory, name)])
    return Table(("memory", "bytes"), rows, frozenset({0}))


def _peak(memory: Any, name: str) -> str:
    return format_size(memory.peaks[name])


def _facts(report: StressReport) -> list[tuple[str, str]]:
    s, memory = report.stats, report.memory
    held = [("hot", s.hot), ("warm", s.warm), ("cold", s.cold)]
    where = ", ".join(f"{name} {number(tier.tokens)}" for name, tier in held)
    taken = ", ".join(
        f"{tier} {_peak(memory, tier)} of {format_size(limit)}"
        for tier, limit in memory.budgets.items()
    )
    spent = ", ".join(f"{phase} {seconds(value)}" for phase, value in report.seconds.items())
    feeding = report.seconds.get("feed", 0.0)
    moved = f"{format_size(s.nvme_bytes_written)} written, {format_size(s.nvme_bytes_read)} read"
    rows = [
        ("model", f"{report.model}: {report.shape}"),
        ("operations", ", ".join(f"{name} {n:,}" for name, n in report.operations.items())),
        ("tokens", f"{number(s.tokens)} ({where})"),
        ("an fp16 cache", format_size(s.fp16_bytes)),
        ("peaks", taken),
        ("NVMe", moved),
        (
            "read-ahead",
            f"{number(s.read_ahead_hits)} hits, {number(s.read_ahead_misses)} misses"
            f", waited {seconds(s.read_stall_seconds)}",
        ),
        ("time", spent),
        ("feeding", f"{report.tokens / feeding:,.0f} tokens/s, checks and all" if feeding else "-"),
    ]
    if report.faults:
        n = report.faults["injected"]
        unseen = any(c.failed for c in report.checks if c.name in _CONTENTS)
        rows.append(("faults", f"{n:,} injected, {'SOME' if unseen else 'none'} undetected"))
    rows += [("note", note) for note in report.notes]
    rows += [("wrong", line) for line in report.wrong]
    return [*rows, ("result", "ok" if report.ok else "FAILED")]


def require_report(path: str) -> None:
    """Make the directory of a report, before it is known what will be in it.

    Raises:
        ConfigError: if it cannot be made, or nothing can be written there.
    """
    target = user_path(path)
    is_file = _is_file(target)
    folder = target.parent if is_file else target
    try:
        if not is_file:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot write to {path!r}: {e.strerror}") from e
    if not folder.is_dir() or target.is_dir() == is_file or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"cannot write to {path!r}: give a file NAME.json in a directory that is there and may "
            f"be written to, or a directory"
        )


def _is_file(target: Path) -> bool:
    return target.suffix == ".json" or (target.exists() and not target.is_dir())


def write_report(
    path: str, document: dict[str, Any], text: str, say: Callable[[str], None]
) -> None:
    """Write a report: to a ``.json`` file, or JSON, text and plots into a directory.

    Raises:
        ConfigError: if it cannot be written.
    """
    target = user_path(path)
    if _is_file(target):
        write_json(str(target), document)
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / "report.txt").write_text(text + "\n", "utf-8", "backslashreplace")
    except OSError as e:
        raise ConfigError(f"cannot write to {path!r}: {e.strerror}") from e
    write_json(str(target / "report.json"), document)
    drawn = plots.draw(document, target)
    say(f"{len(drawn)} plots in {path}" if plots.available() else plots.HINT)


def _status(check: Check) -> str:
    return ("skipped" if check.skipped else "ok") if check.ok else "FAILED"


def _worst(check: Check) -> str:
    return f"{check.worst:.0%}" if check.worst else "-"


def _detail(check: Check) -> str:
    if check.failed:
        return f"{check.failed:,} wrong; {check.failures[0]}"
    return check.skipped


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return number(value) if isinstance(value, int) else str(value)
