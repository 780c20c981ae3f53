"""How many tokens and pages a layer with a sliding window holds: numbers only."""

from __future__ import annotations

from dataclasses import dataclass

SLACK = 16
"""Tokens behind the window that are held: so many can be taken back at any time."""

MOST_PROPOSED = 64
"""Tokens of a call, any of which can be taken back until the next: of speculative decoding."""

LEAST_STEP, MOST_STEP = 64, 256
"""Where nothing is sealed, hot tokens are dropped so many at a time: each time moves the others."""


@dataclass(frozen=True)
class WindowSizes:
    """A window, and how it is divided.

    Attributes:
        reach: tokens that a query sees, at most, itself included.
        keep: of them, how many are the sequence's first.
        hot_tokens: newest tokens that stay in 16 bit.
        page_tokens: tokens per page.
    """

    reach: int
    keep: int
    hot_tokens: int
    page_tokens: int

    @property
    def seals(self) -> bool:
        """Whether there are ever pages: a window that the hot tokens fill has none."""
        return self.reach - self.keep > self.hot_tokens + self.page_tokens

    @property
    def hot_room(self) -> int:
        """Hot tokens with which there is something to do: a page to seal, or tokens to drop."""
        if self.seals:
            return self.keep + self.hot_tokens + self.page_tokens
        return self.reach + SLACK + min(MOST_STEP, max(LEAST_STEP, self.reach // 2))

    @property
    def most_pages(self) -> int:
        """Pages of a sequence between calls, at most, the first one visible in part."""
        if not self.seals:
            return 0
        return (self.reach - 1 - self.keep + SLACK - self.hot_tokens) // self.page_tokens + 1
