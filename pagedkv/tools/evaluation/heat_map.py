"""Scores by depth and length, lost cells marked: as text, and as figures where there is matplotlib.

Rows are depths, columns lengths. A square shows the mean score; behind it, if there are any, the
cells in which the cache scored less than the baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from pagedkv.tools.bench.plots import STYLE, available, file_name
from pagedkv.tools.bench.settings import short_tokens
from pagedkv.tools.evaluation.retrieval_comparison import Square, squares
from pagedkv.tools.evaluation.retrieval_result import RetrievalResult

_INCHES = 0.9  # per length


def text_table(result: RetrievalResult, cache: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows for one cache.

    Returns:
        ``["depth", "1K", …]``, and cells such as ``"0.83"``, or ``"0.67 -2"`` where two were lost.
    """
    table = squares(result, cache)
    headings = ["depth", *(short_tokens(length) for length in result.grid.lengths)]
    rows = [
        [_depth(depth), *(_shown(table.get((depth, length))) for length in result.grid.lengths)]
        for depth in _depths(table)
    ]
    return headings, rows


def draw(result: RetrievalResult, folder: Path) -> list[Path]:
    """Draw a heat map for each cache; the same result gives the same bytes.

    Args:
        result: of a run.
        folder: for the files; made if need be.

    Returns:
        The files; none if matplotlib is missing, or nothing was run.
    """
    if not available() or not result.outcomes:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with import_module("matplotlib").rc_context(STYLE):
        return list(_figures(result, folder))


def _figures(result: RetrievalResult, folder: Path) -> Iterator[Path]:
    for i, cache in enumerate(result.caches):
        table = squares(result, cache)
        if not table:
            continue
        figure = _figure(result, cache, table)
        path = folder / f"retrieval-{i}-{file_name(cache)}.svg"
        figure.savefig(path, format="svg", metadata={"Date": None})
        yield path


def _figure(
    result: RetrievalResult, cache: str, table: dict[tuple[int | None, int], Square]
) -> Any:
    lengths, depths = result.grid.lengths, _depths(table)
    size = (2.6 + _INCHES * len(lengths), 1.4 + 0.45 * len(depths))
    figure = import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    missing = float("nan")
    scores = [
        [table[at].score if (at := (depth, length)) in table else missing for length in lengths]
        for depth in depths
    ]
    image = axes.imshow(scores, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            square = table.get((depth, length))
            if square is None:
                continue
            lost = f"\nlost {square.lost}" if square.lost else ""
            axes.text(column, row, f"{square.score:.2f}{lost}", ha="center", va="center")
    axes.set_xticks(range(len(lengths)), [short_tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [_depth(depth) for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    axes.set_title(f"retrieval, {cache}")
    figure.colorbar(image, label="mean score")
    return figure


def _depths(table: dict[tuple[int | None, int], Square]) -> list[int | None]:
    """From the beginning of the text to its end; last, what has no depth."""
    return sorted({depth for depth, _ in table}, key=lambda depth: (depth is None, depth or 0))


def _shown(square: Square | None) -> str:
    if square is None:
        return "-"
    return f"{square.score:.2f} -{square.lost}" if square.lost else f"{square.score:.2f}"


def _depth(depth: int | None) -> str:
    return "spread" if depth is None else f"{depth} %"
