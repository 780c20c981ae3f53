"""A sealed page, whose it is, and pages that are attended together."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.allocator import Precision, TableEntry
from pagedkv.tiers.cold.record import ColdRecord


@dataclass(eq=False)
class Lineage:
    """A sequence and its forks. `tick` says when one of them was last used."""

    tick: int = 0


@dataclass(eq=False)
class Page:
    """A sealed page: what it is, and where.

    Attributes:
        number: page number within the layer.
        precision: how it was sealed.
        position: token position of its first token, for demotion by distance.
        lineage: whose it is.
        slot: its warm slot, or None.
        record: its copy on disk, or None. At least one of the two is set; a page with both is
            warm and clean: demoting it costs no write.
    """

    number: int
    precision: Precision
    position: int
    lineage: Lineage
    slot: int | None = None
    record: ColdRecord | None = None


@dataclass(frozen=True)
class Run:
    """Consecutive pages of one precision that are attended in one piece.

    Where runs begin and end depends on page order and precision alone, never on the tier.

    Attributes:
        entries: the pages, and how many tokens of each count.
        precision: of all of them.
    """

    entries: tuple[TableEntry, ...]
    precision: Precision

    @property
    def tokens(self) -> int:
        """Valid tokens in the run."""
        return sum(e.tokens for e in self.entries)
