"""Writes docs/models.md: what becomes of each model type's caches. `make models` runs it."""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

import pagedkv
from pagedkv.layer import PagedLayerCache
from pagedkv.streams import inner_caches, streams
from tests.model_matrix import error, everything_hot, exercise, tiny_budgets
from tests.model_zoo import UNBUILDABLE, WITHOUT_PAGES, build, model_types
from tests.zoo_configs import COMMON

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
INTRODUCTION = Path(__file__).with_name("model_table.md")

REASONS = {
    "RotatingKVCache": "sliding window",
    "ChunkedKVCache": "chunked attention",
    "ArraysCache": "state of fixed size",
}
"""What another kind of cache than a plain one holds; why it is left as it is if it is."""

COLUMNS = ("model type", "each layer caches", "paged", "one token", "many", "K8V8")


@dataclass(frozen=True)
class Row:
    """One model type.

    Attributes:
        model_type: the name of mlx-lm's module.
        cells: what is said of it, but for the last column.
        rounding: the last column, a measurement: not the same on every machine.
    """

    model_type: str
    cells: tuple[str, ...]
    rounding: str = ""

    def text(self) -> str:
        """The line of the table."""
        return "| " + " | ".join((f"`{self.model_type}`", *self.cells, self.rounding)) + " |"


@dataclass(frozen=True)
class Facts:
    """What wrapping a model showed.

    Attributes:
        model_type: the name of mlx-lm's module.
        layers: per layer, what it caches, by the kinds of its streams.
        paged: streams that are paged.
        streams: streams in all.
        used: of the paged ones, those that the model uses.
        single: of those, the ones whose attention goes through the hook for one token.
        many: likewise, for many.
    """

    model_type: str
    layers: tuple[str, ...]
    paged: int
    streams: int
    used: int
    single: int
    many: int

    def row(self, rounding: str = "") -> Row:
        """As a line of the table."""
        counts = Counter(self.layers)
        caches = "; ".join(f"{count} x {kind}" for kind, count in counts.items())
        paged = "all" if self.paged == self.streams else f"{self.paged} of {self.streams}"
        hooks = (_share(count, self.used) for count in (self.single, self.many))
        return Row(self.model_type, (caches, paged, *hooks), rounding)


def facts_of(model_type: str, model: Any, cache: pagedkv.PagedCache) -> Facts:
    """Look at an empty paged cache of a model."""
    kinds = tuple(
        _described(mine, theirs) for mine, theirs in zip(cache, _stock_caches(model), strict=True)
    )
    paged = cache.paged_layers
    used = [c for c in paged if c.shape is not None]
    single, many = (sum(bool(c.reaches_hook[one]) for c in used) for one in (True, False))
    return Facts(model_type, kinds, len(paged), len(list(streams(cache))), len(used), single, many)


def _stock_caches(model: Any) -> list[Any]:
    from pagedkv.models import wrapping_of

    wrapping = wrapping_of(model)
    return wrapping.stock() if wrapping else stock.make_prompt_cache(model)


def _described(mine: Any, theirs: Any, nested: bool = False) -> str:
    """What a layer caches, in words; *italic* what is not paged."""
    inner = inner_caches(mine)
    if inner is not None:
        pairs = zip(inner, inner_caches(theirs) or (), strict=True)
        return " + ".join(_described(*pair, nested=True) for pair in pairs)
    if not isinstance(mine, PagedLayerCache):
        kind = type(mine).__name__
        return f"*{REASONS.get(kind, kind)}*"
    kind = type(theirs).__name__
    words = "keys, values" if kind == "KVCache" else REASONS.get(kind, kind)
    shape = mine.shape
    if shape is None:
        return "nothing"  # nemotron-nas makes caches for layers without attention
    if (shape.kv_heads, shape.key_dim) == (1, COMMON["kv_lora_rank"]):
        return "latents, rotary keys"
    reached = any(mine.reaches_hook.values())
    return "keys of an index" if nested and not reached else words


def _share(count: int, of: int) -> str:
    return "yes" if count == of else "no" if not count else f"{count} of {of}"


# The document


def read() -> list[Row]:
    """The rows of the committed document."""
    rows = []
    for line in DOCUMENT.read_text().splitlines():
        if found := re.fullmatch(r"\| `([\w-]+)` \| (.*) \|", line):
            *cells, rounding = found[2].split(" | ")
            rows.append(Row(found[1], tuple(cells), rounding.strip()))
    order = {name: place for place, name in enumerate(model_types())}
    return sorted(rows, key=lambda row: order[row.model_type])


def committed_rows() -> list[Row]:
    """The rows of the committed document, without what was measured."""
    return [Row(row.model_type, row.cells) for row in read()]


def document(rows: Iterable[Row]) -> str:
    """The whole of docs/models.md."""
    table = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(row.text() for row in rows),
    ]
    return INTRODUCTION.read_text().replace("TABLE\n", "\n".join(table) + "\n")


def measured(model_type: str) -> Row:
    """Wrap a model of this type and do to it what the tests do."""
    if reason := UNBUILDABLE.get(model_type):
        return Row(model_type, (f"not run: {reason}", "", "", ""))
    model = build(model_type)
    if reason := WITHOUT_PAGES.get(model_type):
        return Row(model_type, (f"refused: {reason}", "", "", ""))
    expected = exercise(model, stock.make_prompt_cache(model), None)
    with pagedkv.wrap(model, everything_hot()) as cache:
        facts = facts_of(model_type, model, cache)
        config = tiny_budgets(cache)
    with pagedkv.wrap(model, config) as cache, tempfile.TemporaryDirectory():
        paged = exercise(model, cache, None)
    pagedkv.unwrap(model)
    # Nothing is sealed before the third chunk of the prompt.
    names = [name for name in expected.logits if name not in ("prefill 0", "prefill 1")]
    errors = sorted(error(paged.logits[name], expected.logits[name]) for name in names)
    return facts.row(f"{errors[len(errors) // 2]:.2g} / {errors[-1]:.2g}")


def _progress(types: Sequence[str]) -> Iterator[Row]:
    for i, model_type in enumerate(types, 1):
        print(f"\r{i} of {len(types)}: {model_type:30}", end="", file=sys.stderr, flush=True)
        yield measured(model_type)
    print(file=sys.stderr)


def main() -> None:
    """Write the document; with names of model types, only their rows change."""
    mx.disable_compile()
    wanted = sys.argv[1:] or model_types()
    rows = {row.model_type: row for row in (read() if sys.argv[1:] else [])}
    rows.update({row.model_type: row for row in _progress(wanted)})
    DOCUMENT.write_text(document(rows[t] for t in model_types() if t in rows))


if __name__ == "__main__":
    main()
