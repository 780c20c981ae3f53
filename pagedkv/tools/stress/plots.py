"""Figures of a stress run, as PNG files; they need matplotlib (``pagedkv[plots]``)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

HINT = "no plots: they need matplotlib (pip install 'pagedkv[plots]')"

_STYLE = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
_SIZE, _DPI = (7.2, 4.0), 110  # inches, dots per inch
_WINDOWS = 40
_MB = 1e6


def available() -> bool:
    """Whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw tiers, memory, latency and disk traffic of a run.

    Args:
        document: of `StressReport.to_dict`.
        folder: for the files; it is there.

    Returns:
        The files; none if matplotlib is missing.
    """
    if not available() or not document["samples"]:
        return []
    with import_module("matplotlib").rc_context(_STYLE):
        return [
            _tiers(document, folder / "tiers.png"),
            _memory(document, folder / "memory.png"),
            _latency(document, folder / "latency.png"),
            _traffic(document, folder / "traffic.png"),
        ]


def _figure(document: dict[str, Any], title: str, rows: int = 1) -> tuple[Any, Any]:
    figure = import_module("matplotlib.figure").Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots(1, rows)
    figure.suptitle(f"{title}: {document['model']}, {document['tokens']:,} tokens")
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def _column(document: dict[str, Any], name: str) -> Any:
    return np.array([row[name] for row in document["samples"]], float)


def _tiers(document: dict[str, Any], path: Path) -> Path:
    """Bytes per tier over tokens and over time, budgets as lines."""
    figure, both = _figure(document, "bytes per tier, budgets dashed", 2)
    names = ("warm", "cold", "staging", "write buffer")
    for axes, x, label in (
        (both[0], _column(document, "tokens") / 1e3, "thousand tokens"),
        (both[1], _column(document, "seconds"), "seconds"),
    ):
        for i, name in enumerate(names):
            taken = _column(document, name.replace(" ", "_")) / _MB
            axes.plot(x, np.maximum(taken, 0.1), color=f"C{i}", label=name)
            axes.axhline(max(document["budgets"][name] / _MB, 0.1), color=f"C{i}", ls="--", lw=0.8)
        axes.set_yscale("log")
        axes.set_xlabel(label)
    both[0].set_ylabel("MB")
    both[0].legend()
    return _save(figure, path)


def _memory(document: dict[str, Any], path: Path) -> Path:
    """The process and MLX over time, and what they may take."""
    figure, axes = _figure(document, "memory")
    x = _column(document, "seconds")
    for name, label in (
        ("process", "process"),
        ("mlx_active", "MLX, active"),
        ("mlx_cache", "MLX, freed buffers kept"),
        ("warm", "warm tier"),
    ):
        axes.plot(x, _column(document, name) / _MB, label=label)
    axes.axhline(document["memory"]["allowed"] / _MB, color="k", ls="--", lw=0.8, label="allowed")
    axes.axhline(document["budgets"]["warm"] / _MB, color="C3", ls="--", lw=0.8)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MB")
    axes.set_ylim(bottom=0)
    axes.legend()
    return _save(figure, path)


def _latency(document: dict[str, Any], path: Path) -> Path:
    """Seconds per step by length: every step, and p50 and p99 where there are many."""
    figure, axes = _figure(document, "time of a step; p50 solid, p99 dashed")
    for i, (kind, steps) in enumerate(document["steps"].items()):
        tokens, seconds = np.array(steps, float).T
        axes.plot(tokens / 1e3, seconds, ".", color=f"C{i}", ms=3, alpha=0.5, label=kind)
        if len(steps) >= 2 * _WINDOWS:
            order = np.argsort(tokens)
            groups = np.array_split(order, _WINDOWS)
            middle = [tokens[g].mean() / 1e3 for g in groups]
            for percent, style in ((50, "-"), (99, "--")):
                line = [np.percentile(seconds[g], percent) for g in groups]
                axes.plot(middle, line, style, color=f"C{i}", lw=1)
    axes.set_yscale("log")
    axes.set_xlabel("thousand tokens held")
    axes.set_ylabel("seconds, all layers")
    axes.legend()
    return _save(figure, path)


def _traffic(document: dict[str, Any], path: Path) -> Path:
    """MB per second to and from the disk, and tokens per second."""
    figure, both = _figure(document, "disk traffic and speed", 2)
    x = _column(document, "seconds")
    edges = np.linspace(x[0], x[-1], min(_WINDOWS * 3, max(2, len(x))))
    width = np.maximum(np.diff(edges), 1e-9)
    for name in ("read", "written"):
        total = np.interp(edges, x, _column(document, name))
        both[0].plot(edges[1:], np.diff(total) / width / _MB, label=name, lw=1)
    both[0].set_ylabel("MB/s")
    both[0].legend()
    both[1].plot(x, _column(document, "tokens") / 1e3, lw=1)
    both[1].set_ylabel("thousand tokens held")
    for axes in both:
        axes.set_xlabel("seconds")
    return _save(figure, path)
