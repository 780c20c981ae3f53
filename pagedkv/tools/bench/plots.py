"""Figures of a result, as SVG files; they need matplotlib (``pip install 'pagedkv[plots]'``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pagedkv.tools.bench.contenders import SHUFFLED
from pagedkv.tools.bench.result import OK, Row
from pagedkv.tools.bench.settings import short_tokens

HINT = "no plots: they need matplotlib (pip install 'pagedkv[plots]')"

GIB = 2**30

STYLE = {"svg.hashsalt": "pagedkv", "svg.fonttype": "none", "font.size": 9}
_SIZE = (6.4, 4.0)  # inches


def available() -> bool:
    """Whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def draw(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw every figure that the rows have numbers for.

    The same rows give the same bytes.

    Args:
        rows: of a result.
        folder: for the files; made if need be.

    Returns:
        The files; none if matplotlib is missing.
    """
    if not available():
        return []
    measured = [row for row in rows if row["status"] == OK]
    folder.mkdir(parents=True, exist_ok=True)
    with import_module("matplotlib").rc_context(STYLE):
        return list(_figures(measured, folder))


def _figures(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    attention = [r for r in rows if r["part"] == "attention" and not r["what"].endswith(SHUFFLED)]
    for shape in dict.fromkeys(r["shape"] for r in attention):
        mine = [r for r in attention if r["shape"] == shape]
        name = str(shape).replace("/", "-")
        title = f"attention, {shape}"
        figure = _Figure(f"{title}: time and roofline (dashed)", "µs", log=True)
        yield figure.lines(mine, "us", dashed="roofline_us").save(folder / f"attention-{name}.svg")
        figure = _Figure(f"{title}: speed relative to fp16", "times")
        yield figure.lines(mine, "times_fp16").save(folder / f"speed-{name}.svg")
    whole = (("decode", ("ms", "times_fp16", "cache_bytes")), ("prefill", ("tokens_per_s",)))
    for part, names in whole:
        for model in dict.fromkeys(r["model"] for r in rows if r["part"] == part):
            mine = [r for r in rows if r["part"] == part and r["model"] == model]
            for name in names:
                yield _whole_model(part, str(model), name, mine).save(
                    folder / f"{part}-{_FILE[name]}-{file_name(str(model))}.svg"
                )


_FILE = {"ms": "time", "times_fp16": "speed", "cache_bytes": "memory", "tokens_per_s": "speed"}


def _whole_model(part: str, model: str, name: str, rows: Sequence[Row]) -> _Figure:
    if name == "ms":
        figure = _Figure(f"{part}, {model}: time per token and roofline (dashed)", "ms")
        return figure.lines(rows, "ms", dashed="roofline_ms")
    if name == "times_fp16":
        return _Figure(f"{part}, {model}: speed relative to fp16", "times").lines(rows, name)
    if name == "cache_bytes":
        figure = _Figure(f"{part}, {model}: cache, and MLX's peak (dashed)", "GiB")
        return figure.lines(rows, "cache_bytes", dashed="peak_bytes", scale=1 / GIB)
    return _Figure(f"{part}, {model}", "tokens/s").lines(rows, name)


def file_name(text: str) -> str:
    """A text as part of a file's name: letters, digits and points, hyphens for the rest."""
    words = "".join(c if c.isalnum() or c == "." else " " for c in text).split()
    return "-".join(words)


class _Figure:
    """One set of axes over the depth in tokens."""

    def __init__(self, title: str, unit: str, log: bool = False) -> None:
        figure = import_module("matplotlib.figure").Figure(figsize=_SIZE, layout="constrained")
        self._figure: Any = figure
        self._axes: Any = figure.add_subplot()
        self._axes.set_title(title)
        self._axes.set_xlabel("tokens in the cache")
        self._axes.set_ylabel(unit)
        self._axes.set_xscale("log", base=2)
        self._log = log
        if log:
            self._axes.set_yscale("log")
        self._axes.grid(True, alpha=0.3)

    def lines(
        self, rows: Sequence[Row], name: str, dashed: str = "", scale: float = 1.0
    ) -> _Figure:
        """One line for each kind of cache, and a dashed one in the same colour."""
        for i, what in enumerate(dict.fromkeys(r["what"] for r in rows)):
            mine = sorted((r for r in rows if r["what"] == what), key=lambda r: int(r["depth"]))
            mine = [r for r in mine if r.get(name) is not None]
            depths = [r["depth"] for r in mine]
            values = [scale * r[name] for r in mine]
            self._axes.plot(depths, values, "o-", color=f"C{i}", label=what, markersize=3)
            if dashed:
                under = [scale * r[dashed] for r in mine]
                self._axes.plot(depths, under, "--", color=f"C{i}", linewidth=0.8)
        depths = sorted({r["depth"] for r in rows})
        self._axes.set_xticks(depths, [short_tokens(d) for d in depths])
        self._axes.minorticks_off()
        if not self._log:
            self._axes.set_ylim(bottom=0)
        self._axes.legend()
        return self

    def save(self, path: Path) -> Path:
        """Write the file."""
        self._figure.savefig(path, format="svg", metadata={"Date": None})
        return path
