"""Properties that a stress run watches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pagedkv.cache.paged_cache import PagedCache
from pagedkv.errors import PagedKVError

_KEPT = 5  # failures kept in words


@dataclass
class Check:
    """One property that is watched in many places.

    Attributes:
        name: of the property.
        worst: largest deviation seen, as a fraction of what is allowed.
        count: places where it was looked at.
        failed: how many of them were wrong.
        failures: the first few in words.
        skipped: why it was not looked at; empty if it was.
    """

    name: str
    worst: float = 0.0
    count: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def ok(self) -> bool:
        """Whether it held wherever it was looked at, and was looked at unless that was skipped."""
        return self.failed == 0 and (self.count > 0 or bool(self.skipped))

    def see(self, fraction: float, where: str) -> None:
        """Note one measurement; above 1, or not a number, it is a failure."""
        self.worst = max(self.worst, fraction) if math.isfinite(fraction) else math.inf
        if fraction <= 1:
            self.count += 1
        else:
            self.fail(f"{where}: {fraction:.3g} times what is allowed")

    def hold(self, true: bool, otherwise: str) -> None:
        """Note one yes or no."""
        if true:
            self.count += 1
        else:
            self.fail(otherwise)

    def fail(self, text: str) -> None:
        """Note a failure."""
        self.count += 1
        self.failed += 1
        if len(self.failures) < _KEPT:
            self.failures.append(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, which has no infinity."""
        worst = self.worst if math.isfinite(self.worst) else None
        return {**asdict(self), "worst": worst, "ok": self.ok}


def check_books(caches: Sequence[PagedCache], tokens: int, check: Check) -> None:
    """Offsets agree, and pages, slots, references and positions are conserved in every layer.

    Args:
        caches: every open sequence of one pager; the first is the one that is looked at.
        tokens: that it must hold.
        check: where what is found is noted.
    """
    for layer in caches[0].paged_layers:
        check.hold(
            layer.offset == tokens,
            f"layer {layer.layer} holds {layer.offset:,} of {tokens:,} tokens",
        )
        if layer._pager is None or layer._table is None:
            continue
        twins = (c for cache in caches for c in cache.paged_layers if c.layer == layer.layer)
        try:
            layer._pager.check([c._table for c in twins if c._table is not None])
        except PagedKVError as e:
            check.fail(f"layer {layer.layer}: {e}")
        position = caches[0].context.config.sink_tokens
        wrong = None
        for page, valid in layer.located_pages():
            if page.position != position and wrong is None:
                wrong = f"page {page.number} of token {page.position:,} stands at {position:,}"
            position += valid
        check.hold(wrong is None, f"layer {layer.layer}: {wrong}")
    store = caches[0].context.pager.open_cold
    if store is not None:
        try:
            store.check()
        except PagedKVError as e:
            check.fail(f"cold tier: {e}")
