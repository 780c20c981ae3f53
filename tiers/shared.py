"""What the pagers of all layers share: a contract, which `pager.Pager` keeps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from pagedkv.allocator import TableEntry
from pagedkv.tiers.budget import TierBudget
from pagedkv.tiers.codec.transform import Treatment
from pagedkv.tiers.cold.prefetch import ColdReader
from pagedkv.tiers.memory_pressure import Pressure
from pagedkv.tiers.store import FileColdStore
from pagedkv.tiers.turn import Turn


@dataclass
class PagerCounters:
    """Page movements since the pager was made; `pressed` are those demoted for want of memory."""

    sealed: int = 0
    lowered: int = 0
    demoted: int = 0
    promoted: int = 0
    pressed: int = 0
    warm_bytes_returned: int = 0


class SharedTiers(Protocol):
    """The budgets, the cold store and its staging, as one layer sees them."""

    @property
    def budget(self) -> TierBudget:
        """Limits, of all layers together."""

    @property
    def layers(self) -> int:
        """Layers that share them."""

    @property
    def counters(self) -> PagerCounters:
        """Page movements, to be counted on."""

    @property
    def abandoned(self) -> deque[tuple[Any, list[TableEntry]]]:
        """Layers and entries of tables that are gone, to be released at the next safe point."""

    @property
    def turn(self) -> Turn:
        """Of the threads that use the tiers."""

    @property
    def pressure(self) -> Pressure:
        """Says whether memory is short."""

    @property
    def has_cold(self) -> bool:
        """Whether pages may go to disk at all."""

    @property
    def cold(self) -> FileColdStore:
        """The cold store, opened at first use."""

    @property
    def open_cold(self) -> FileColdStore | None:
        """The cold store if it is open."""

    @property
    def reader(self) -> ColdReader:
        """The staging ring, made at first use."""

    def settle(self, layer: int, treatment: Treatment | None) -> None:
        """Note a layer's treatment for as long as the tiers are used."""

    def relieve(self) -> bool:
        """See that somebody gives up a sequence, if there is one to give up."""

    def cold_summary(self) -> str:
        """The cold tier's state in a few words, for error messages."""
