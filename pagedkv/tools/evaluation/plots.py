"""Figures of a comparison, in SVG; they need matplotlib (``pip install 'pagedkv[plots]'``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pagedkv.tools.bench.plots import HINT, STYLE, available, file_name
from pagedkv.tools.bench.result import OK, Row
from pagedkv.tools.evaluation.result import summary
from pagedkv.tools.evaluation.settings import DECODE, LEGS
from pagedkv.tools.evaluation.variants import AGAIN, LADDER, LAYERS, MLX_LM, REFERENCE, UNIFORM

__all__ = ["HINT", "available", "draw", "front"]

_SIZE = (6.8, 4.4)  # inches
_MARKS = {UNIFORM: "o", LAYERS: "D", LADDER: "s", MLX_LM: "^"}
_NAMES = {
    UNIFORM: "one precision",
    LAYERS: "more bits in some layers",
    LADDER: "ladder",
    MLX_LM: "mlx-lm quantized",
}
_FLOOR = 1e-9
"""A logarithmic scale has no zero."""


def draw(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw every figure that the rows have numbers for; the same rows give the same bytes.

    Args:
        rows: of a result.
        folder: for the files; made if need be.

    Returns:
        The files; none if matplotlib is missing.
    """
    if not available():
        return []
    measured = [row for row in rows if row["status"] == OK and row["kind"] != REFERENCE]
    folder.mkdir(parents=True, exist_ok=True)
    with import_module("matplotlib").rc_context(STYLE):
        return list(_figures(measured, folder))


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both numbers, by the first of them; least is best."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _figures(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    for model in dict.fromkeys(row["model"] for row in rows):
        for leg in LEGS:
            mine = [r for r in rows if r["model"] == model and r["leg"] == leg]
            if not mine:
                continue
            yield _pareto(
                mine, f"{leg}, {model}", folder / f"pareto-{leg}-{file_name(str(model))}.svg"
            )
            if leg == DECODE:
                for text in dict.fromkeys(r["text"] for r in mine):
                    name = f"kl-by-position-{file_name(str(text))}-{file_name(str(model))}.svg"
                    here = [r for r in mine if r["text"] == text and r["segment"] == 0]
                    if here:
                        yield _by_position(here, f"{leg}, {model}, {text}", folder / name)


def _pareto(rows: Sequence[Row], title: str, path: Path) -> Path:
    """Bytes per token against mean KL, with the front of each text."""
    figure, axes = _axes(title, "bytes per token, all layers", "mean KL to its own cache, nats")
    points = summary([row for row in rows if row["kind"] != AGAIN])  # as large as the reference
    for i, text in enumerate(dict.fromkeys(row["text"] for row in points)):
        mine = [row for row in points if row["text"] == text and "kl_mean" in row]
        for kind, mark in _MARKS.items():
            some = [_place(row) for row in mine if row["kind"] == kind]
            if some:
                label = f"{_NAMES[kind]}, {text}"
                axes.plot(*zip(*some, strict=True), mark, color=f"C{i}", label=label, alpha=0.8)
        axes.plot(*zip(*front(list(map(_place, mine))), strict=True), "--", color=f"C{i}", lw=0.8)
        for row in mine if i == 0 else ():  # the others' bytes are the same
            where = {"xytext": (4, 4), "textcoords": "offset points"}
            axes.annotate(row["what"], _place(row), fontsize=6, **where)
    axes.legend(fontsize=7)
    return _save(figure, path)


def _place(row: Row) -> tuple[float, float]:
    return row["bytes_per_token"], max(_FLOOR, row["kl_mean"])


def _by_position(rows: Sequence[Row], title: str, path: Path) -> Path:
    """Mean KL of every few positions."""
    width = rows[0]["kl_bin"]
    figure, axes = _axes(title, "token of the text", f"KL, nats (mean of {width} positions)")
    for i, row in enumerate(rows):
        values = [max(_FLOOR, value) for value in row["kl_binned"]]
        start = row["tokens"] - row["positions_all"]
        places = [start + width * (n + 0.5) for n in range(len(values))]
        axes.plot(places, values, color=f"C{i}", label=row["what"], linewidth=1)
    axes.legend(fontsize=7, ncols=2)
    return _save(figure, path)


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    figure = import_module("matplotlib.figure").Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_yscale("log")
    axes.grid(True, alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, format="svg", metadata={"Date": None})
    return path
