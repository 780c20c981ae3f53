"""How many bytes of disk the cold tier may take, and who has them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DiskBudget:
    """A limit on everything under the cold directory.

    Attributes:
        limit: bytes, whoever wrote them.
        layers: layers that share what is left for pages, in equal parts.
        foreign: bytes that other stores and files had taken when the store was opened.
        checkpoints: bytes of our checkpoints now.
        reserve: bytes kept free of pages for checkpoints to come.
    """

    limit: int
    layers: int
    foreign: int = 0
    checkpoints: int = 0
    reserve: int = 0

    @property
    def for_pages(self) -> int:
        """Bytes that all page files may take together."""
        return max(0, self.limit - self.foreign - self.checkpoints - self.reserve)

    @property
    def layer_share(self) -> int:
        """Bytes that the page files of one layer may take."""
        return self.for_pages // max(self.layers, 1)

    def __str__(self) -> str:
        text = f"{self.layer_share:,} of {self.limit:,} bytes"
        others = {
            "files found in the directory": self.foreign,
            "checkpoints": self.checkpoints + self.reserve,
        }
        taken = [f"{n:,} for {what}" for what, n in others.items() if n]
        return f"{text} ({', '.join(taken)})" if taken else text
