"""How many bytes of disk the cold tier may take, and who has them."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.allocator import LayerLadders


@dataclass
class DiskBudget:
    """A limit on everything under the cold directory.

    Attributes:
        limit: bytes, whoever wrote them.
        layers: layers that share what is left for pages.
        foreign: bytes that other stores and files had taken when the store was opened.
        checkpoints: bytes of our checkpoints now.
        reserve: bytes kept free of pages for checkpoints to come.
        ladders: of the layers, whose parts are in proportion; equal parts if None.
    """

    limit: int
    layers: int
    foreign: int = 0
    checkpoints: int = 0
    reserve: int = 0
    ladders: LayerLadders | None = None

    @property
    def for_pages(self) -> int:
        """Bytes that all page files may take together."""
        return max(0, self.limit - self.foreign - self.checkpoints - self.reserve)

    def layer_share(self, layer: int) -> int:
        """Bytes that the page files of one layer may take."""
        if self.ladders is None:
            return self.for_pages // max(self.layers, 1)
        return int(self.for_pages * self.ladders.part(self.layers, layer))

    def told(self, layer: int) -> str:
        """A layer's share, and who has the rest, for error messages."""
        text = f"{self.layer_share(layer):,} of {self.limit:,} bytes"
        others = {
            "files found in the directory": self.foreign,
            "checkpoints": self.checkpoints + self.reserve,
        }
        taken = [f"{n:,} for {what}" for what, n in others.items() if n]
        return f"{text} ({', '.join(taken)})" if taken else text
