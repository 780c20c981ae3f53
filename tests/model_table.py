"""Writes docs/models.md: what becomes of each model type's caches. `make models` runs it."""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

import pagedkv
from pagedkv.cache.nested import inner_caches, streams
from pagedkv.sequence.layer import PagedLayerCache
from tests import model_zoo, vlm_zoo
from tests.model_matrix import (
    LONG_PREFILL,
    PLAIN,
    error,
    everything_hot,
    exercise,
    stock_caches,
    tiny_budgets,
    wrapped,
)
from tests.zoo_configs import COMMON

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
INTRODUCTION = Path(__file__).with_name("model_table.md")

LM, VLM = "mlx-lm", "mlx-vlm"
"""Libraries; each has a table, behind a heading that begins with its name."""

REASONS = {
    "RotatingKVCache": "sliding window",
    "ChunkedKVCache": "chunked attention",
    "ArraysCache": "state of fixed size",
    "KVCache": "flags of tokens",
    "MiniMaxM3KVCache": "keys, values and an index in one",
    "PoolingCache": "pooled keys",
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
    from pagedkv.integrations.mlx_lm.wrapping import wrapping_of

    wrapping = wrapping_of(model)
    return wrapping.stock() if wrapping else stock_caches(model)


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
    words = "keys, values" if kind in PLAIN else REASONS.get(kind, kind)
    shape = mine.shape
    if shape is None:
        return "nothing"  # nemotron-nas makes caches for layers without attention
    if (shape.kv_heads, shape.key_dim) == (1, COMMON["kv_lora_rank"]):
        return "latents, rotary keys"
    index = nested and shape.kv_heads == 1 and not any(mine.reaches_hook.values())
    return "keys of an index" if index and kind in PLAIN else words


def _share(count: int, of: int) -> str:
    return "yes" if count == of else "no" if not count else f"{count} of {of}"


# The document


def read(library: str = LM) -> list[Row]:
    """A library's rows in the committed document, but for types that have none of their own."""
    text = re.split(rf"^## {library}\b.*$", DOCUMENT.read_text(), flags=re.MULTILINE)[1]
    rows = []
    for line in re.split(r"^## ", text, flags=re.MULTILINE)[0].splitlines():
        if found := re.fullmatch(r"\| `([\w-]+)` \| (.*) \|", line):
            *cells, rounding = found[2].split(" | ")
            rows.append(Row(found[1], tuple(cells), rounding.strip()))
    return rows


def committed_rows(library: str = LM) -> list[Row]:
    """The rows of the committed document, without what was measured."""
    return [Row(row.model_type, row.cells) for row in read(library)]


def document(rows: Iterable[Row], vlm_rows: Iterable[Row]) -> str:
    """The whole of docs/models.md."""
    same: dict[str, list[str]] = {}
    for name, home in vlm_zoo.homes().items():
        if name != home:
            same.setdefault(home, []).append(f"`{name}`")
    more = [f"{', '.join(names)} (`{home}`)" for home, names in sorted(same.items())]
    others = [f"`{name}`" for name in vlm_zoo.packages() if name not in vlm_zoo.homes()]
    return (
        INTRODUCTION.read_text()
        .replace("VLM_TABLE\n", _table(vlm_rows))
        .replace("TABLE\n", _table(rows))
        .replace("SAME", _wrapped_text(more))
        .replace("OTHERS", _wrapped_text(others))
    )


def _table(rows: Iterable[Row]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *(r.text() for r in rows)]
    return "\n".join(lines) + "\n"


def _wrapped_text(words: Sequence[str]) -> str:
    return textwrap.fill(", ".join(words), 110, break_on_hyphens=False)


def measured(model_type: str, zoo: ModuleType) -> Row:
    """Wrap a model of this type and do to it what the tests do."""
    if reason := getattr(zoo, "UNBUILDABLE", {}).get(model_type):
        return Row(model_type, (f"not run: {reason}", "", "", ""))
    if reason := zoo.WITHOUT_PAGES.get(model_type):
        return Row(model_type, (f"refused: {reason}", "", "", ""))
    model = zoo.build(model_type)
    expected = exercise(model, stock_caches(model), None, LONG_PREFILL)
    with wrapped(model, everything_hot()) as cache:
        facts = facts_of(model_type, model, cache)
        config = tiny_budgets(cache)
    with wrapped(model, config) as cache:
        paged = exercise(model, cache, None, LONG_PREFILL)
    # Nothing is sealed before the third chunk of the prompt.
    names = [name for name in expected.logits if name not in ("prefill 0", "prefill 1")]
    errors = sorted(error(paged.logits[name], expected.logits[name]) for name in names)
    return facts.row(f"{errors[len(errors) // 2]:.2g} / {errors[-1]:.2g}")


def _rows(zoo: ModuleType, library: str, wanted: Sequence[str]) -> list[Row]:
    """A library's rows, those of some types measured again."""
    rows = {row.model_type: row for row in read(library)}
    types = zoo.model_types()
    for name in (again := [t for t in types if not wanted or t in wanted]):
        print(f"\r{library}: {name:30}", end="", file=sys.stderr, flush=True)
        rows[name] = measured(name, zoo)
    print(f"\r{library}: {len(again)} of {len(types)} types{'':30}", file=sys.stderr)
    return [rows[t] for t in types if t in rows]


def main() -> None:
    """Write the document; with names of model types, only their rows change."""
    mx.disable_compile()
    wanted = sys.argv[1:]
    DOCUMENT.write_text(document(_rows(model_zoo, LM, wanted), _rows(vlm_zoo, VLM, wanted)))


if __name__ == "__main__":
    main()
