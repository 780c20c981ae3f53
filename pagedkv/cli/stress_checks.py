"""What a stress run watches, and its report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from pagedkv.cache import PagedCache
from pagedkv.cli.output import Table, facts, number, seconds
from pagedkv.errors import PagedKVError
from pagedkv.sizes import format_size
from pagedkv.stats import CacheStats

Watch = Callable[[str, int, int, str], None]
"""Told the phase, units done, units in all, and how full the budgets are."""

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


class BudgetWatch:
    """Samples what the tiers of a cache really take, and keeps the peaks."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        budget = cache.context.pager.budget
        self.budgets = {"warm": budget.warm_bytes, "cold": budget.cold_bytes}
        self.peaks = dict.fromkeys(self.budgets, 0)
        self.check = Check("budgets")

    def sample(self) -> None:
        """Look at every tier once."""
        pager = self._cache.context.pager
        taken = {
            "warm": sum(layer.warm_bytes for layer in pager.layer_pagers),
            "cold": pager.open_cold.nbytes if pager.open_cold else 0,
        }
        for tier, nbytes in taken.items():
            self.peaks[tier] = max(self.peaks[tier], nbytes)
            limit = self.budgets[tier]
            if nbytes:
                self.check.see(
                    nbytes / limit if limit else math.inf,
                    f"{tier} takes {nbytes:,} of {limit:,} bytes at {self._cache.offset:,} tokens",
                )
            else:
                self.check.count += 1

    def note(self) -> str:
        """How full the budgets are, in a few words."""
        return "  ".join(
            f"{tier} {format_size(peak)}/{format_size(self.budgets[tier])}"
            for tier, peak in self.peaks.items()
        )


def check_books(cache: PagedCache, tokens: int, check: Check) -> None:
    """Offsets agree, and pages, slots, references and positions are conserved in every layer."""
    for layer in cache.paged_layers:
        check.hold(
            layer.offset == tokens,
            f"layer {layer.layer} holds {layer.offset:,} of {tokens:,} tokens",
        )
        if layer._pager is None or layer._table is None:
            continue
        try:
            layer._pager.check([layer._table])
        except PagedKVError as e:
            check.fail(f"layer {layer.layer}: {e}")
        position = cache.context.config.sink_tokens
        for page, valid in layer.located_pages():
            check.hold(
                page.position == position,
                f"layer {layer.layer}: page {page.number} of token {page.position:,} stands at "
                f"{position:,}",
            )
            position += valid
    store = cache.context.pager.open_cold
    if store is not None:
        try:
            store.check()
        except PagedKVError as e:
            check.fail(f"cold tier: {e}")


@dataclass
class StressReport:
    """What happened.

    Attributes:
        model: its name.
        tokens: prompt tokens.
        checks: each property and how it held.
        seconds: per phase.
        peaks: the most bytes each tier was seen to take.
        budgets: what they may take.
        stats: of the cache, before it was closed.
        needles: position, tier, precision, worst error and cosine of each.
    """

    model: str
    tokens: int
    checks: list[Check]
    seconds: dict[str, float]
    peaks: dict[str, int]
    budgets: dict[str, int]
    stats: CacheStats
    needles: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "ok": self.ok,
            "model": self.model,
            "tokens": self.tokens,
            "checks": [_plain(check) for check in self.checks],
            "seconds": self.seconds,
            "peaks": self.peaks,
            "budgets": self.budgets,
            "needles": self.needles,
            "stats": self.stats.to_dict(),
        }

    def tables(self) -> list[Table]:
        """For people."""
        rows = [[c.name, _status(c), number(c.count), _worst(c), _detail(c)] for c in self.checks]
        tables = [
            Table(("check", "status", "looks", "worst", "detail"), rows, frozenset({0, 1, 4})),
            facts(self._facts()),
        ]
        if self.needles:
            names = ("token", "tier", "precision", "error", "cosine")
            cells = [[_cell(needle[name]) for name in names] for needle in self.needles]
            tables.insert(1, Table(names, cells, frozenset({1, 2}), "needles, worst of all heads"))
        return tables

    def _facts(self) -> list[tuple[str, str]]:
        s = self.stats
        held = [("hot", s.hot), ("warm", s.warm), ("cold", s.cold)]
        where = ", ".join(f"{name} {number(tier.tokens)}" for name, tier in held)
        taken = ", ".join(
            f"{tier} {format_size(peak)} of {format_size(self.budgets[tier])}"
            for tier, peak in self.peaks.items()
        )
        spent = ", ".join(f"{phase} {seconds(value)}" for phase, value in self.seconds.items())
        feeding = self.seconds.get("prefill", 0.0)
        return [
            ("tokens", f"{number(s.tokens)} ({where})"),
            ("an fp16 cache", format_size(s.fp16_bytes)),
            ("peaks", taken),
            (
                "NVMe",
                f"{format_size(s.nvme_bytes_written)} written, "
                f"{format_size(s.nvme_bytes_read)} read",
            ),
            (
                "read-ahead",
                f"{number(s.read_ahead_hits)} hits, {number(s.read_ahead_misses)} misses"
                f", waited {seconds(s.read_stall_seconds)}",
            ),
            ("time", spent),
            ("prefill", f"{self.tokens / feeding:,.0f} tokens/s" if feeding else "-"),
            ("result", "ok" if self.ok else "FAILED"),
        ]


def _plain(check: Check) -> dict[str, Any]:
    worst = check.worst if math.isfinite(check.worst) else None  # JSON has no infinity
    return {**asdict(check), "worst": worst, "ok": check.ok}


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
