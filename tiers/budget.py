"""The numbers a pager is built from: budgets in bytes, windows in tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from pagedkv.allocator import ConfigError, LayerLadders, Precision

MIB = 2**20


@dataclass(frozen=True)
class TierBudget:
    """Limits of one pager, all layers together.

    Attributes:
        warm_bytes: memory for sealed pages.
        cold_bytes: disk for sealed pages; 0 keeps everything in memory.
        cold_dir: parent of the store's directory; None for the temporary directory.
        ladders: precision of sealed pages by distance, of each layer.
        hot_tokens: newest tokens that stay in 16 bit.
        sink_tokens: first tokens that stay in 16 bit for ever.
        page_tokens: 256, 512 or 1024; None lets the geometry choose.
        staging_bytes: memory for pages being read from disk.
        write_buffer_bytes: memory for pages being written to disk.
        scratch_bytes: memory for one layer's dequantized pages during prefill.
        write_limit: bytes written to disk per day; None for no limit.
        bounds_bytes: memory for the bounds of cold pages; 0 where none are wanted.
        kept_pages: cold pages per layer that stay in memory once read.
        keep_free: memory that the machine should have left; 0 does not look.
    """

    warm_bytes: int
    cold_bytes: int
    cold_dir: str | None
    ladders: LayerLadders
    hot_tokens: int
    sink_tokens: int
    page_tokens: int | None = None
    staging_bytes: int = 32 * MIB
    write_buffer_bytes: int = 16 * MIB
    scratch_bytes: int = 256 * MIB
    write_limit: int | None = None
    bounds_bytes: int = 0
    kept_pages: int = 0
    keep_free: int = 0

    def warm_share(self, layers: int, layer: int) -> int:
        """Warm bytes of one layer, in proportion to what a token takes in it.

        Half a share is held back in all, so that even while the last slab doubles (old and new
        exist together for a moment) the budget is kept.
        """
        return int(self.warm_bytes * self._warm_part(layers, layer))

    def _warm_part(self, layers: int, layer: int) -> Fraction:
        return self.ladders.part(layers, layer, held_back=Fraction(1, 2))

    def cold_share(self, layers: int, layer: int) -> int:
        """Disk of one layer, likewise, as long as nothing else takes any."""
        return int(self.cold_bytes * self.ladders.part(layers, layer))

    def warm_slots(
        self,
        layers: int,
        layer: int,
        page_tokens: int,
        page_bytes: Mapping[Precision, int],
    ) -> dict[Precision, int]:
        """Divide a layer's warm share between the steps of its ladder.

        A near step gets as many slots as its distance can hold, the last one all the rest, and
        each at least one.

        Args:
            layers: layers that share the warm budget.
            layer: number of this one.
            page_tokens: tokens per page.
            page_bytes: bytes of a page per precision, in the ladder's order.

        Raises:
            ConfigError: if the share is smaller than one page of each precision.
        """
        share, least = self.warm_share(layers, layer), sum(page_bytes.values())
        if share < least:
            enough = math.ceil(least / self._warm_part(layers, layer))
            raise ConfigError(
                f"warm budget {self.warm_bytes:,} bytes is smaller than one page of each "
                f"precision in each of {layers} layers: layer {layer} gets {share:,} bytes and "
                f"needs {least:,}; give at least {enough:,}"
            )
        ladder = self.ladders.of(layer)
        slots: dict[Precision, int] = {}
        for precision, nbytes in page_bytes.items():
            least -= nbytes
            slots[precision] = (share - least) // nbytes
            step = ladder.rank(precision)
            if step < len(ladder.reach):
                reach = max(0, ladder.reach[step] - self.hot_tokens)
                slots[precision] = min(slots[precision], -(-reach // page_tokens) + 1)
            share -= slots[precision] * nbytes
        return slots

    def require_cold(self, layers: int, layer: int, page_bytes: int, pages_per_run: int) -> None:
        """Check that the disk takes a page, and the memory on the way what moves at once.

        Raises:
            ConfigError: if a layer's cold share or the write buffer holds no page, or staging
                no run of pages.
        """
        if (share := self.cold_share(layers, layer)) < page_bytes:
            enough = math.ceil(page_bytes / self.ladders.part(layers, layer))
            raise ConfigError(
                f"cold budget {self.cold_bytes:,} bytes is smaller than one page in each of "
                f"{layers} layers: layer {layer} gets {share:,} bytes and needs {page_bytes:,}; "
                f"give at least {enough:,}, or 0 for no disk"
            )
        if self.staging_bytes < page_bytes * pages_per_run:
            raise ConfigError(
                f"staging budget {self.staging_bytes:,} bytes is smaller than one batch of "
                f"{pages_per_run} pages of {page_bytes:,}: give at least "
                f"{page_bytes * pages_per_run:,}"
            )
        if self.write_buffer_bytes < page_bytes:
            raise ConfigError(
                f"write_buffer budget {self.write_buffer_bytes:,} bytes is smaller than one page "
                f"of {page_bytes:,}: give at least that"
            )
